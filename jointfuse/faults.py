"""What is wrong with a tree of settings, and whose mistake it is: the recipe's or an override's."""

import difflib
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jointfuse.errors import UserError
from jointfuse.overrides import overridden


class Fault(NamedTuple):
    """The first setting that is wrong."""

    message: str  # begins with its key
    together: bool  # settings of a section that do not go with each other


def find_fault(tree: dict[str, Any], model: type[BaseModel]) -> Fault | None:
    unknown = _unknown(tree, model, "")
    if unknown:
        return Fault(unknown, together=False)
    try:
        model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]") or "settings"
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        together = isinstance(first["input"], dict | BaseModel)
        shown = "" if together else f" = {repr(first['input'])[:200]}"
        return Fault(f"{key}{shown}: {message}", together)
    return None


def blame(fault: Fault, model: type[BaseModel], recipe: dict[str, Any], path: str, overrides: Sequence[str]) -> str:
    """Whose mistake a fault is: the recipe's, or of those overrides without which it would not be there."""

    def remains(kept: Sequence[str]) -> bool:
        try:
            return find_fault(overridden(recipe, kept), model) == fault
        except UserError:  # an override that stands on another one
            return False

    if remains([]):
        return path
    others = [[*overrides[:number], *overrides[number + 1 :]] for number in range(len(overrides))]
    to_blame = [one for one, kept in zip(overrides, others, strict=True) if not remains(kept)] or list(overrides)
    named = " and ".join(f"'{one}'" for one in to_blame)
    if len(to_blame) > 1:
        return f"overrides {named}"
    return f"override {named} does not go with {path}" if fault.together else f"override {named}"


def _unknown(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> str | None:
    """What is wrong with the first key that no setting has, its nearest neighbour included."""
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            known = [prefix + name for name in model.model_fields]
            return (
                f"unknown setting '{prefix}{key}'{neighbour(f'{prefix}{key}', known)}; "
                f"known here: {', '.join(model.model_fields)}"
            )
        inner = model_in(field.annotation)
        items = {f"{prefix}{key}.": value}
        if isinstance(value, list):
            items = {f"{prefix}{key}.{number}.": item for number, item in enumerate(value)}
        for inside, item in items.items():
            if inner and isinstance(item, dict) and (unknown := _unknown(item, inner, inside)):
                return unknown
    return None


def model_in(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next((found for part in get_args(annotation) if (found := model_in(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def neighbour(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""
