"""Shards that lie elsewhere, kept on local disk: fetched once a machine, checked, given up when others need the room.

A cached shard is FOLDER/SHA256.tar. That it was checked is written in its modification time, so that whatever is done
to it later is seen without reading it again; when it was used last, in its access time.
"""

import errno
import fcntl
import hashlib
import os
import re
import select
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jointfuse.errors import UserError
from jointfuse.files import put_in_place

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds between the first two attempts, doubled with each
STALLED = 60.0  # seconds without a byte
CHUNK = 2**20


class ShardCache:
    """The shards of a corpus of which only corpus.json, sidecars and indices are at hand.

    Any number of processes of a machine may share a folder: each shard is fetched by the first that asks, while the
    others wait.

    Args:
        remote: what webdataset opens (https://..., s3://..., `pipe:` and a command), with {split} and {shard} where the
            names of those go.
        folder: made where it is missing.
        most_bytes: of all shards in the folder; the ones used longest ago make room.

    Raises:
        UserError: `remote` does not say where {shard} goes, or no such folder can be made.
    """

    def __init__(self, remote: str, folder: Path, most_bytes: int) -> None:
        if "{shard}" not in remote:
            raise UserError(f"data.remote = {remote!r}: write {{shard}} where the name of a shard goes")
        self.remote, self.folder, self.most_bytes = remote, folder, most_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache = {folder}: no folder can be made there ({error.strerror})") from error

    def open(self, split: str, shard: dict[str, Any]) -> int:
        """A descriptor of a shard, whole and checked; it stays readable whatever is given up.

        Args:
            shard: its name, bytes and sha256, as corpus.json has them.

        Raises:
            UserError: it cannot be fetched, or there is no room for it.
        """
        path = self._path(shard)
        with _locked(path.with_suffix(".lock")):
            if not _is_whole(path, shard):
                self._fetch(split, shard, path)
            os.utime(path, ns=(time.time_ns(), _mark(shard)))
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def drop(self, shard: dict[str, Any]) -> None:
        """Have a shard fetched again when it is next asked for."""
        path = self._path(shard)
        with _locked(path.with_suffix(".lock")):
            path.unlink(missing_ok=True)

    def _path(self, shard: dict[str, Any]) -> Path:
        # A corpus from others names its shards and their hashes; it gets no say in where files are written.
        if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
            raise UserError(f"shard {shard['name']}: {shard['sha256']!r} is no SHA-256; do not trust this corpus")
        return self.folder / f"{shard['sha256']}.tar"

    def _url(self, split: str, name: str) -> str:
        # Nor in what a shell does.
        safe: Callable[[str], str] = shlex.quote if self.remote.startswith("pipe:") else quote
        return self.remote.replace("{split}", safe(split)).replace("{shard}", safe(name))

    def _fetch(self, split: str, shard: dict[str, Any], path: Path) -> None:
        url, part, size = self._url(split, shard["name"]), path.with_suffix(".part"), shard["bytes"]
        if size > self.most_bytes:
            raise UserError(
                f"data.cache_gib = {self.most_bytes / 2**30:g}: one shard alone has {size / 2**30:.3g} GiB; allow more"
            )
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                self._reserve(size, part)
                if _download(url, part, size) != shard["sha256"]:
                    raise OSError("its SHA-256 is not the one in corpus.json")
                put_in_place(part, path)
                return
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno == errno.ENOSPC:
                    self._give_up(size)
            finally:
                part.unlink(missing_ok=True)
        raise UserError(
            f"{url}: shard {split}/{shard['name']} was not to be had in {ATTEMPTS} attempts ({reason}); "
            f"see that data.remote can be read from here and that data.cache = {self.folder} has room"
        )

    def _reserve(self, size: int, part: Path) -> None:
        """A part that counts with all its bytes from the start, and room for it."""
        with _locked(self.folder / "room.lock"):
            held = sum(status.st_size for status in self._held().values())
            self._give_up(held + size - self.most_bytes)
            with part.open("wb") as file:
                file.truncate(size)

    def _give_up(self, size: int) -> None:
        """So many bytes, or all there are, of what was used longest ago and is not being opened or fetched now."""
        held = self._held()
        for path in sorted(held, key=lambda path: held[path].st_atime_ns):
            if size <= 0:
                return
            with _locked(path.with_suffix(".lock"), wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                    size -= held[path].st_size

    def _held(self) -> dict[Path, os.stat_result]:
        """Shards, and parts, some of them left by the dead."""
        held: dict[Path, os.stat_result] = {}
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.part")):
            with suppress(FileNotFoundError):
                held[path] = path.stat()
        return held


def cache_of(remote: str, folder: str, gib: float) -> ShardCache | None:
    """The cache that data.remote, data.cache and data.cache_gib ask for. Raises UserError where half of it is named."""
    if bool(remote) != bool(folder):
        given, missing = ("remote", "cache") if remote else ("cache", "remote")
        raise UserError(f"data.{given} is set and data.{missing} is not: tars that lie elsewhere need both")
    return ShardCache(remote, Path(folder), int(gib * 2**30)) if remote else None


def _mark(shard: dict[str, Any]) -> int:
    """The modification time, in nanoseconds, of a shard that has been checked."""
    return int(shard["sha256"][:7], 16) * 10**9


def _is_whole(path: Path, shard: dict[str, Any]) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if status.st_size != shard["bytes"]:
        return False
    if status.st_mtime_ns == _mark(shard):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]


def _download(url: str, part: Path, size: int) -> str:
    """The SHA-256 of what came. Raises OSError."""
    from webdataset.gopen import gopen

    digest, received = hashlib.sha256(), 0
    source = gopen(url)
    process = getattr(source, "proc", None)
    try:
        with part.open("r+b") as file:
            for chunk in _chunks(source.stream if process else source):
                received += len(chunk)
                if received > size:
                    raise OSError(f"it has more than the {size} bytes that corpus.json says")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        source.close()  # raises where the command failed
        if received < size:
            raise OSError(f"it ended after {received} of {size} bytes")
    finally:
        if process and process.poll() is None:
            process.kill()
        with suppress(OSError):
            source.close()
    return digest.hexdigest()


def _chunks(stream: Any) -> Iterator[bytes]:
    while True:
        if not select.select([stream], [], [], STALLED)[0]:
            raise OSError(f"nothing came for {STALLED:g} s")
        chunk = os.read(stream.fileno(), CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone of this machine holds the lock; the system lets go of a dead one's."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
