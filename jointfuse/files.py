"""Files that are read and written whole: the only module that renames, and the only one that parses JSON and YAML.

A writer's reader finds the old file or the whole new one, on disk, never half of it. A reader's error names the file,
the place in it, and the way out.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from jointfuse.errors import UserError
from jointfuse.patience import PATIENCE, patiently

Content = TypeVar("Content")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` only once it is whole and on disk; on an error nothing is left."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, replacing `path` in one step; half of a surrogate pair is written as its escape."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, replacing `path` in one step."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


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
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {f'{place}: ' if place else ''}{first['msg']}; {way_out}") from error


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
    """Safely loaded. Raises yaml.YAMLError, also where a key is given twice."""
    return yaml.load(text, _Values)


def read_yaml(path: Path, way_out: str, strings: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, safely loaded.

    Args:
        strings: every value is left a string.

    Raises:
        UserError: the file cannot be read, is not YAML, names a key twice or is no mapping; `way_out` ends its message.
    """
    text = read_text(path, way_out)
    try:
        tree = yaml.load(text, _Strings) if strings else parse_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); {way_out}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__} in place of named entries; {way_out}")
    return tree
