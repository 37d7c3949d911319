"""How long tests wait: limits are of a machine like ours with nothing else to do, and longer on one that is slower or
busy."""

import hashlib
import time

REFERENCE = 0.07  # seconds that `work` takes there
OFTEN = 30.0  # seconds for which a measurement stands
MOST = 20.0  # times as long: what hangs must end on any machine

_measured: list[tuple[float, float]] = []  # when, and how slow: the last one


def stretched(seconds: float) -> float:
    """A limit of so many seconds, as many times longer as this machine is slower now."""
    return seconds * slowness()


def slowness() -> float:
    """How many times longer than there a fixed piece of work takes here and now; 1 to MOST."""
    now = time.monotonic()
    if not _measured or now - _measured[-1][0] > OFTEN:
        work()
        _measured[:] = [(now, (time.monotonic() - now) / REFERENCE)]
    return min(max(1.0, _measured[-1][1]), MOST)


def work() -> None:
    """Python and hashing in turns, in one thread, long enough to have to share a core with others."""
    data = bytes(2**20)
    for _ in range(40):
        hashlib.sha256(data).digest()
        sum(range(100_000))
