"""Shards that lie elsewhere, kept on local disk: fetched once a machine, checked, given up when others need the room.

A cached shard is FOLDER/SHA256.tar. That it was checked is written in its modification time, so that whatever is done
to it later is seen without reading it again; when it was used last, in its access time.
"""

import errno
import hashlib
import os
import re
import select
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jointfuse.errors import UserError
from jointfuse.files import put_in_place
from jointfuse.lock import locked
from jointfuse.patience import PATIENCE, Away, patiently

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
        patience: seconds for what is away to come back.

    Raises:
        UserError: `remote` does not say where {shard} goes, or no such folder can be made.
    """

    def __init__(self, remote: str, folder: Path, most_bytes: int, patience: float = PATIENCE) -> None:
        if "{shard}" not in remote:
            raise UserError(f"data.remote = {remote!r}: write {{shard}} where the name of a shard goes")
        self.remote, self.folder, self.most_bytes, self.patience = remote, folder, most_bytes, patience
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache = {folder}: no folder can be made there ({error.strerror})") from error

    def open(self, split: str, shard: dict[str, Any]) -> int:
        """A descriptor of a shard, whole and checked; it stays readable whatever is given up.

        Args:
            shard: its name, bytes and sha256, as corpus.json has them.

        Raises:
            UserError: there is no such shard or no room for it.
            PassingFault: it could not be fetched.
        """
        path = self._path(shard)
        with locked(path.with_suffix(".lock")):
            if not _is_whole(path, shard):
                self._fetch(split, shard, path)
            os.utime(path, ns=(time.time_ns(), _mark(shard)))
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def drop(self, shard: dict[str, Any]) -> None:
        """Have a shard fetched again when it is next asked for."""
        path = self._path(shard)
        with locked(path.with_suffix(".lock")):
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
        wrong = 0

        def fetch() -> None:
            nonlocal wrong
            try:
                self._reserve(size, part)
                _download(url, part, size, shard["sha256"])
                put_in_place(part, path)
            except _AnotherFile:
                wrong += 1
                if wrong > 1:
                    raise
                raise Away("it came damaged") from None
            except OSError as error:
                if error.errno == errno.ENOSPC and self._give_up(size):
                    raise Away("no room for it") from error
                raise
            finally:
                part.unlink(missing_ok=True)

        try:
            patiently(fetch, f"{url}: shard {split}/{shard['name']}", self.patience)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{url}: shard {split}/{shard['name']} was not to be had ({reason}); see that data.remote can be read "
                f"from here, that it is of this corpus, and that data.cache = {self.folder} has room"
            ) from error

    def _reserve(self, size: int, part: Path) -> None:
        """A part that counts with all its bytes from the start, and room for it."""
        with locked(self.folder / "room.lock"):
            held = sum(status.st_size for status in self._held().values())
            self._give_up(held + size - self.most_bytes)
            with part.open("wb") as file:
                file.truncate(size)

    def _give_up(self, size: int) -> bool:
        """So many bytes, or all there are, of what was used longest ago and is not being opened or fetched now; whether
        that was anything."""
        any_given = False
        held = self._held()
        for path in sorted(held, key=lambda path: held[path].st_atime_ns):
            if size <= 0:
                break
            with locked(path.with_suffix(".lock"), wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                    size -= held[path].st_size
                    any_given = True
        return any_given

    def _held(self) -> dict[Path, os.stat_result]:
        """Shards, and parts, some of them left by the dead."""
        held: dict[Path, os.stat_result] = {}
        for path in (*self.folder.glob("*.tar"), *self.folder.glob("*.part")):
            with suppress(FileNotFoundError):
                held[path] = path.stat()
        return held


def cache_of(remote: str, folder: str, gib: float, patience: float = PATIENCE) -> ShardCache | None:
    """The cache that data.remote, data.cache, data.cache_gib and data.patience ask for. Raises UserError where half of
    it is named."""
    if bool(remote) != bool(folder):
        given, missing = ("remote", "cache") if remote else ("cache", "remote")
        raise UserError(f"data.{given} is set and data.{missing} is not: tars that lie elsewhere need both")
    return ShardCache(remote, Path(folder), int(gib * 2**30), patience) if remote else None


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


class _AnotherFile(OSError):
    """What came is not what corpus.json describes."""


def _download(url: str, part: Path, size: int, sha256: str) -> None:
    """Raises OSError: Away where what sends it failed, _AnotherFile."""
    from webdataset.gopen import gopen

    digest, received = hashlib.sha256(), 0
    source = gopen(url)
    process = getattr(source, "proc", None)
    try:
        with part.open("r+b") as file:
            for chunk in _chunks(source.stream if process else source):
                received += len(chunk)
                if received > size:
                    raise _AnotherFile(f"it has more than the {size} bytes that corpus.json says")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        _close(source)
        if received < size:
            raise Away(f"it ended after {received} of {size} bytes")
        if digest.hexdigest() != sha256:
            raise _AnotherFile("its SHA-256 is not the one in corpus.json")
    finally:
        if process and process.poll() is None:
            process.kill()
        with suppress(OSError):
            source.close()


def _close(source: Any) -> None:
    try:
        source.close()
    except OSError as error:  # the command that sends it failed
        raise Away(str(error)) from error


def _chunks(stream: Any) -> Iterator[bytes]:
    while True:
        if not select.select([stream], [], [], STALLED)[0]:
            raise Away(f"nothing came for {STALLED:g} s")
        chunk = os.read(stream.fileno(), CHUNK)
        if not chunk:
            return
        yield chunk
