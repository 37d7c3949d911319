"""`section.key=value` laid over the tree of a recipe."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import yaml

from jointfuse.errors import UserError
from jointfuse.files import parse_yaml


def overridden(recipe: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A recipe's tree with overrides on top, the last of several that say the same. Raises UserError naming one that
    has another shape."""
    tree = deepcopy(recipe)
    for override in overrides:
        _apply(tree, override)
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': write section.key=value, for example train.lr=3e-5")
    try:
        value = parse_yaml(text) if text else None
    except (yaml.YAMLError, RecursionError) as error:
        why = f" ({problem})" if (problem := getattr(error, "problem", None)) else ""
        raise UserError(f"override '{override}': '{text}' is not a YAML value{why}") from error
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{section}' is a value, not a section")
        node = child
    # A backbone has one source: naming the other one replaces it.
    if last in ("weights", "scratch") or (sections and sections[-1] == "scratch"):
        owner, chosen = (node, last) if last in ("weights", "scratch") else (_owner(tree, sections), "scratch")
        if value is not None:
            owner["scratch" if chosen == "weights" else "weights"] = None
    if key == "data.mix" and value:
        node["corpus"] = ""
    if key == "data.corpus" and value:
        node["mix"] = []
    if key in ("train.epochs", "train.steps") and value is not None:
        node["steps" if last == "epochs" else "epochs"] = None
    node[last] = value


def _owner(tree: dict[str, Any], sections: list[str]) -> dict[str, Any]:
    node = tree
    for section in sections[:-1]:
        node = node[section]
    return node
