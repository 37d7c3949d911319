"""Files that are read and written whole: the only module that renames, and the only one that parses JSON and YAML.

A writer's reader finds the old file or the whole new one, on disk, never half of it. A reader's error names the file,
the place in it, and the way out.
"""

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from jointfuse.errors import UserError
from jointfuse.patience import PATIENCE, patiently

Content = TypeVar("Content")
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
LONGEST_PLACE, LONGEST_REASON = 200, 300  # characters of a message


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails inside names the file: a full disk does not, and libraries in Rust and C++ raise kinds of their own.

    Raises:
        OSError: with `path`, for each of them.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        hidden, number = error.__context__, re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, RuntimeError) and isinstance(hidden, OSError) and hidden.errno:
            raise OSError(hidden.errno, hidden.strerror, str(path)) from error
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` only once it is whole and on disk; on an error nothing is left."""
    part = path.with_name(f".{path.name}.part")
    try:
        with naming(path), part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Give a file that is whole and on disk its name, in one step that is on disk too."""
    part.replace(path)
    _sync(path.parent)


def replace_folder(part: Path, folder: Path) -> None:
    """Put a folder that is whole in the place of another, or where none is. All its files are on disk before.

    Where the system can exchange two names (Linux, on most disks), `folder` is there at every instant; elsewhere what
    was there is `former(folder)` for one.
    """
    for path in part.rglob("*"):
        _sync(path)
    _sync(part)
    old = former(folder)
    shutil.rmtree(old, ignore_errors=True)
    if not folder.exists():
        part.rename(folder)
    elif _exchanged(part, folder):
        old = part
    else:
        folder.rename(old)
        part.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def former(folder: Path) -> Path:
    """Where the content of a folder is for the instant in which another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _exchanged(one: Path, other: Path) -> bool:
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or an old C library
        return False
    return not exchange(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk; some file systems know no such thing of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Add lines to a file that grows; they reach the system at once."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, replacing `path` in one step; half of a surrogate pair is written as its escape."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, replacing `path` in one step; half of a surrogate pair becomes its escape."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_text(path, re.sub("[\ud800-\udfff]", lambda half: rf"\\u{ord(half[0]):04x}", text) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, way_out: str, patience: float = PATIENCE) -> str:
    """The text of a UTF-8 file. Raises UserError where it cannot be read, whose message `way_out` ends, PassingFault
    where its disk is away for longer than `patience` seconds."""
    try:
        return patiently(path.read_bytes, str(path), patience).decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged, byte {error.start} is not UTF-8 text; {way_out}") from error


def read_json(path: Path, kind: type[Content], way_out: str, patience: float = PATIENCE) -> Content:
    """The content of a JSON file, checked against `kind`: a pydantic model, a TypedDict, or any type of Python.

    Raises:
        UserError: the file cannot be read, is not JSON, or is not of `kind`; `way_out` ends its message.
        PassingFault: its disk is away for longer than `patience` seconds.
    """
    text = read_text(path, way_out, patience)
    try:
        return parse_json(text, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {way_out}") from error


def parse_json(text: str | bytes, kind: type[Content]) -> Content:
    """The content of a JSON text, checked against `kind`. Raises ValueError: the place and what is wrong."""
    try:
        content: Content = _adapter(kind).validate_json(text)  # type: ignore[arg-type]
        return content
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")[:LONGEST_PLACE]
        reason = first["msg"].removeprefix("Value error, ")[:LONGEST_REASON]
        raise ValueError(f"{place}: {reason}" if place else reason) from error


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class _EveryKeyOnce:
    """A loader that refuses a key given twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[misc]
        return mapping


class _Values(_EveryKeyOnce, yaml.SafeLoader):
    """Numbers, strings, lists and mappings; nothing is constructed."""


class _Strings(_EveryKeyOnce, yaml.BaseLoader):
    """The same without numbers: 01 stays 01."""


def parse_yaml(text: str) -> Any:
    """Safely loaded. Raises yaml.YAMLError, also where a key is given twice, for a date that is none, a number of
    thousands of digits, and lists a thousand deep."""
    return _load(text, _Values)


def _load(text: str, loader: type[_Values] | type[_Strings]) -> Any:
    try:
        return yaml.load(text, loader)
    except (ValueError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(error) from error


def read_yaml(path: Path, way_out: str, strings: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, safely loaded.

    Args:
        strings: every value is left a string.

    Raises:
        UserError: the file cannot be read, is not YAML, names a key twice or is no mapping; `way_out` ends its message.
    """
    text = read_text(path, way_out)
    try:
        tree = _load(text, _Strings) if strings else parse_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"{path}: not valid YAML ({reason}); {way_out}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__} in place of named entries; {way_out}")
    return tree
