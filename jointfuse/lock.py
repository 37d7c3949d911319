"""Files and folders that one process at a time may work on.

A lock is flock's: the system lets go of it when its process dies, whatever it dies of. Between processes of one machine
it holds on any file system. Between machines it holds where the file system carries it: NFS version 4, Lustre mounted
with `flock`, GPFS, CephFS. NFS version 3 with `nolock` and Lustre with `localflock` see the processes of one machine
alone. Of a machine that is lost, an NFS server lets go after its lease, some 90 seconds. NFS locks files, not folders.
Where there are no locks there is no promise, and nothing is refused.
"""

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # the last of folders on NFS


class Lock:
    """The lock on a file, which is made where it is missing, or on a folder that is there."""

    descriptor = -1

    def __init__(self, path: Path) -> None:
        kind = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self.descriptor = os.open(path, kind | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        self.close()

    def take(self, wait: bool = False, shared: bool = False) -> bool:
        """Whether it is had now.

        Args:
            wait: until it is.
            shared: beside others that share it.
        """
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return True

    def keep_from_forks(self) -> None:
        """Forked processes close their copies, for one that outlives this process would go on holding the lock."""
        own = weakref.ref(self)

        def close() -> None:
            lock = own()
            if lock:
                lock.close()

        os.register_at_fork(after_in_child=close)

    def release(self) -> None:
        """Let go of it, whoever has copies."""
        if self.descriptor >= 0:
            with suppress(OSError):  # where there are no locks
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Let go of it once all copies in forked processes are closed as well."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone has the lock, inside."""
    lock = Lock(path)
    try:
        yield lock.take(wait)
    finally:
        lock.close()
