"""What the ranks agree on between two steps: to stop, as a signal reaches them at different moments and all must save
the same step; and that all of them have written their part of a checkpoint."""

import threading

import torch
import torch.distributed as dist


class Vote:
    """Cast by every rank at the end of a step and counted at the end of the next: what any of them knew counts for all.

    The votes travel while a step is computed, over a group of their own on the CPU: no step waits.

    Args:
        asked: set where this rank is to stop.
    """

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked
        self.group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._votes = torch.zeros(2, dtype=torch.int32)  # to stop, busy
        self._travelling: dist.Work | None = None

    def count(self) -> tuple[bool, bool]:
        """Whether to stop, and whether any rank was busy, when the last votes were cast."""
        if self._travelling is not None:
            self._travelling.wait()
            self._travelling = None
        stop, busy = self._votes.tolist()
        return bool(stop), bool(busy)

    def cast(self, busy: bool) -> None:
        self._votes[0], self._votes[1] = self.asked.is_set(), busy
        if self.group is not None:
            self._travelling = dist.all_reduce(self._votes, dist.ReduceOp.MAX, self.group, async_op=True)
