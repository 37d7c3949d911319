"""What people see while it runs: a live bar in a terminal, plain lines elsewhere, nothing on ranks other than 0."""

import logging
import resource
import time
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def peak_memory() -> float:
    """Peak memory of this process in GiB: of its GPU where it has one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Display:
    """Progress of `steps` training steps.

    Args:
        first: whether this is rank 0; other ranks show nothing.
    """

    def __init__(self, steps: int, done: int, first: bool) -> None:
        self.console = Console(quiet=not first, highlight=False, soft_wrap=True)
        self.live = first and self.console.is_terminal
        self.steps = steps
        self.started, self.done_before = time.monotonic(), done
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.log, self.lines = logging.getLogger("jointfuse"), _Lines(self)
        self.task = self.bar.add_task("train", total=steps, completed=done, epoch=0, figures="")

    def __enter__(self) -> "Display":
        self.log.addHandler(self.lines)
        self.log.setLevel(logging.INFO)
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.log.removeHandler(self.lines)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, step: int, epoch: int) -> None:
        self.bar.update(self.task, completed=step, epoch=epoch + 1)

    def figures(self, step: int, epoch: int, loss: float, rate: float) -> None:
        """Loss and utterances per second since the last call; in a terminal the bar shows them, elsewhere a line."""
        shown = f"loss {loss:.4f}  {rate:.1f} utterances/s  {peak_memory():.1f} GiB"
        self.bar.update(self.task, figures=shown)
        if not self.live:
            passed = time.monotonic() - self.started
            left = passed / max(1, step - self.done_before) * (self.steps - step)
            self.line(f"step {step}/{self.steps}  epoch {epoch + 1}  {shown}  ETA {timedelta(seconds=round(left))}")


class _Lines(logging.Handler):
    """What any part of jointfuse has to say, as lines of the display."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.line(record.getMessage())
