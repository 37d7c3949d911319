"""A rank that hangs says where, and ends: its launcher then ends the others."""

import os
import sys
import threading
import time

from jointfuse.interruption import FAULT

LOOKS = 20  # in the time that is allowed


class Watchdog:
    """Ends the process where too long passes between two calls of `step`.

    Args:
        rank: of this process.
        seconds: that a step may take, with whatever is done behind it.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self.begun, self.since = 0, time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def step(self, number: int) -> None:
        """Step `number` begins."""
        self.begun, self.since = number, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self.seconds / LOOKS):
            if time.monotonic() - self.since > self.seconds:
                print(
                    f"error: rank {self.rank}: step {self.begun} has taken more than train.longest_step = "
                    f"{self.seconds:g} s: this rank, another one or the network hangs; --resume goes on from the last "
                    "checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(FAULT)
