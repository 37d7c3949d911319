"""Run a command; when standard input closes or TERM comes, kill it with everything that came of it, daemons too.

A test that is itself killed closes its end, so nothing outlives it. One that goes on sends TERM: processes that it has
forked since, such as a loader's workers, hold the pipe open.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>: orphans below us become our children


def descendants() -> set[int]:
    """Living processes that this one started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


class Told(Exception):
    pass


def end(number: int, frame: object) -> None:
    raise Told


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    # Only now, since the command would inherit both.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close our standard input
    with suppress(Told):
        signal.signal(signal.SIGTERM, end)
        sys.stdin.buffer.read()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while alive := descendants():
        for process in alive:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
