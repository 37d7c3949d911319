"""How DeepSpeed's checkpoint files get to the disk: whole and synced, if wanted while training goes on."""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from jointfuse.errors import UserError
from jointfuse.files import naming
from jointfuse.train.quiet import deepspeed


class Writer(deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine):
    """Writes the files of one rank.

    Args:
        background: training waits for the copy to host memory alone, and whoever needs the files for `finish`.
    """

    def __init__(self, background: bool) -> None:
        super().__init__()
        self.name = "jointfuse"
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._begun: list[Future[None]] = []

    def create(self, info: Any) -> None:
        assert not self._begun, "one checkpoint at a time"

    def save(self, state_dict: Any, path: str) -> None:
        if self._pool:
            self._begun.append(self._pool.submit(_write, _on_host(state_dict), path))
        else:
            _write(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        # Only of a run's own folder: see checkpoint.load_checkpoint.
        try:
            return torch.load(path, map_location=map_location, weights_only=False)
        except Exception as error:  # unpickling may raise anything
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{path}: cannot be read ({why}); resume from another checkpoint of the run") from error

    def commit(self, info: Any) -> bool:
        return True

    @property
    def busy(self) -> bool:
        return not all(begun.done() for begun in self._begun)

    def finish(self) -> None:
        """Wait for what `save` was given. Raises OSError where a file could not be written."""
        begun, self._begun = self._begun, []
        for one in begun:
            one.result()


def _write(state: Any, path: str) -> None:
    with naming(Path(path)), open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _on_host(state: Any, seen: dict[int, Any] | None = None) -> Any:
    """The same with tensors of its own on the CPU, so that the next step may change the others."""
    seen = {} if seen is None else seen
    if isinstance(state, torch.Tensor):
        if id(state) not in seen:
            seen[id(state)] = state.detach().to("cpu", copy=True)
        return seen[id(state)]
    if type(state) in (list, tuple):
        return type(state)(_on_host(value, seen) for value in state)
    if isinstance(state, dict):
        copied = copy.copy(state)
        for key, value in state.items():
            copied[key] = _on_host(value, seen)
        return copied
    return copy.deepcopy(state)
