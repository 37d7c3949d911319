"""Waiting for a disk or a server that is away for a while."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from jointfuse.errors import PassingFault, may_pass

PATIENCE = 60.0  # seconds, unless data.patience says otherwise
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0  # seconds; each wait is twice the one before
SAID = 3.0  # seconds; whoever waits for longer than that says so

Result = TypeVar("Result")


class Away(OSError):
    """Something that may come back, of which the system has no number."""


def patiently(work: Callable[[], Result], what: str, patience: float = PATIENCE) -> Result:
    """What `work()` returns, asked again with growing waits while it fails with what may pass.

    Args:
        what: is waited for; a file or an address.
        patience: seconds since the first failure, at the most.

    Raises:
        PassingFault: it failed until then; the message names `what`.
        OSError: a failure that does not pass.
    """
    since, wait, quiet = time.monotonic(), FIRST_WAIT, True
    while True:
        try:
            return work()
        except OSError as error:
            if not (isinstance(error, Away) or may_pass(error)):
                raise
            reason = error.strerror or str(error)
            passed = time.monotonic() - since
            if passed >= patience:
                raise PassingFault(
                    f"{what}: not to be had for {passed:.0f} s ({reason}); start again once it is back, or set a "
                    f"data.patience of more than {patience:g} s"
                ) from error
        wait = min(wait, LONGEST_WAIT, patience - passed)
        if quiet and wait >= SAID:
            print(f"{what}: {reason}; waiting for it, {patience - passed:.0f} s at most", file=sys.stderr, flush=True)
            quiet = False
        time.sleep(wait)
        wait *= 2
