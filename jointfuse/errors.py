"""The exceptions that people are meant to read, and the exit statuses that go with them."""

import errno

USER_ERROR = 2
PASSING = 75  # EX_TEMPFAIL of sysexits.h

# What a network disk that is away, or comes back, answers with.
MAY_PASS = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENOLINK),
    *(errno.ECOMM, errno.EPROTO, errno.ENOLCK),
}


class ReadableError(Exception):
    """Command lines print it as one line and exit with its status; it is never shown as a stack trace."""

    status = 1


class UserError(ReadableError, ValueError):
    """A mistake its reader can mend: the message names the file or setting and the way out."""

    status = USER_ERROR


class PassingFault(ReadableError):
    """Nobody's mistake, and perhaps gone at the next start: a disk or a server was away for too long."""

    status = PASSING


class EndedError(ReadableError):
    """A process that this one has started ended with `status`, and so does this one."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def may_pass(error: OSError) -> bool:
    """Whether the same may go well a little later; what is missing, forbidden or full stays so."""
    return error.errno in MAY_PASS


def line_and_status(error: ReadableError | OSError) -> tuple[str, int]:
    """What a command says last, after `error: `, and its exit status."""
    if isinstance(error, ReadableError):
        line, status = str(error), error.status
    else:
        reason = error.strerror or str(error) or type(error).__name__
        line = f"{error.filename}: {reason}" if error.filename else reason
        status = PASSING if may_pass(error) else USER_ERROR
    return " ".join(line.splitlines()), status
