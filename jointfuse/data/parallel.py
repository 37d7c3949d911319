"""Worker processes and a progress display, for work that is one job a shard."""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

KEPT = 32 * 2**20  # bytes of freed memory that a worker process may keep


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(workers: int, preload: str | None = None) -> ProcessPoolExecutor:
    """A pool of fresh interpreters that outlive neither their parent nor a Ctrl-C.

    With `preload`, they are copies of one that has imported this module: importing takes longer than many a job.
    """
    _for_one_core()
    forked = preload and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if preload and forked:
        context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def preload(*modules: str) -> None:
    """Begin to import what the processes of later pools will need, in the one they will be copies of.

    For work that has something else to do first. Nothing, where a pool was there before or processes cannot be copied.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing.forkserver import ensure_running, set_forkserver_preload

        _for_one_core()
        set_forkserver_preload(list(modules))
        ensure_running()


def _for_one_core() -> None:
    """Set what the processes to come inherit."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # with more threads they fight over the cores
    # Else glibc hands the memory of one clip back to the system, which has to clear it again for the next.
    os.environ |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(KEPT))


def _start_worker() -> None:
    """Let the parent alone answer Ctrl-C, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """From now on, this process of multiprocessing ends when the one that started it is gone, however that went."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def progress(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A live bar in a terminal, one line at a time elsewhere; both on standard error."""
    if sys.stderr.isatty():
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    count = done

    def advance() -> None:
        nonlocal count
        count += 1
        if count == total or count % math.ceil(total / 20) == 0:
            print(f"{title}: {count} of {total} shards", file=sys.stderr, flush=True)

    if done:
        print(f"{title}: {done} of {total} shards are there already", file=sys.stderr, flush=True)
    yield advance
