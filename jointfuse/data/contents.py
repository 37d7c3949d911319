"""What the files hold that a shard is made from, and a record of it that spares a resumed build reading them again.

A file is taken for unchanged, and not read again, while its size, its time of change and the time of change of its
inode are as recorded. No program sets the last of these back: content that was replaced under its old time is seen too.
The record names paths and times of this machine, so no finished corpus holds it.
"""

import hashlib
from pathlib import Path

from jointfuse.errors import UserError
from jointfuse.files import read_json, write_json

Entry = tuple[int, int, int, str]  # bytes, mtime and ctime in nanoseconds, SHA-256


class Contents:
    """The files of one shard's rows.

    Args:
        record: what an earlier run wrote about them, if it did.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._hashed: dict[str, Entry] = {}
        try:
            self._known = read_json(record, dict[str, Entry], "it is written again")
        except UserError:
            self._known = {}

    def hash(self, path: Path) -> str:
        """Of what the file holds now, looked at once. Raises OSError."""
        name = str(path)
        if name not in self._hashed:
            size, modified, changed = _look(path)
            known = self._known.get(name)
            if known and known[:3] == (size, modified, changed):
                self._hashed[name] = known
            else:
                self._hashed[name] = (size, modified, changed, _digest(path))
        return self._hashed[name][3]

    def check(self) -> None:
        """Raise UserError where a file does not hold what it held when it was hashed."""
        for name, entry in self._hashed.items():
            try:
                same = _look(Path(name)) == entry[:3] or _digest(Path(name)) == entry[3]
            except OSError:
                same = False
            if not same:
                raise UserError(f"{name}: was changed while it was read; run the same command again")

    def write(self) -> None:
        """Record the files for a later run."""
        write_json(self._record, self._hashed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _look(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
