"""Where each entry of a YAML file stands, and which keys stand in it twice: what a message about a fault names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from medlore.errors import InputError
from medlore.files import existing_file

Place = tuple[str | int, ...]


def read_mapping(file: str | Path) -> tuple[dict[Any, Any], dict[Place, int], list[str]]:
    """A YAML mapping; the line of each of its entries; a sentence for each key that stands twice.

    Raises:
        InputError: no such file, no YAML, or no mapping.
    """
    try:
        text = existing_file(file).read_text(encoding="utf-8")
        loaded, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        lines, repeated = _lines_of(tree), list(_repeated_keys(tree))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2024-13-01 is a ValueError
        raise InputError(str(file), f"not YAML ({error})", "a YAML mapping of settings", "correct the file") from error
    if not isinstance(loaded, dict):
        raise InputError(str(file), f"holds a {type(loaded).__name__}", "a YAML mapping of settings", "write `name: value` lines")
    return loaded, lines, repeated


def lines_in(file: str | Path) -> dict[Place, int]:
    """Where each key and list entry of a YAML file that could be read stands: place -> line, from 1."""
    return _lines_of(yaml.compose(existing_file(file).read_text(encoding="utf-8"), yaml.SafeLoader))


def line_of(place: Place, lines: dict[Place, int]) -> int | None:
    """The line of an entry, or of the nearest mapping around it that has one."""
    return next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)


def _lines_of(node: yaml.Node | None, place: Place = (), seen: set[int] | None = None) -> dict[Place, int]:
    """(tasks, 0, name) -> line; what an alias repeats is looked at once."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return {}
    seen.add(id(node))
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(number, value, value) for number, value in enumerate(node.value)]
    found: dict[Place, int] = {}
    for name, key, value in children:
        found[*place, name] = key.start_mark.line + 1
        found |= _lines_of(value, (*place, name), seen)
    return found


def _repeated_keys(node: yaml.Node | None, place: Place = (), seen: set[int] | None = None) -> Iterator[str]:
    """Keys that stand twice in one mapping, where YAML would silently take the last."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            here, line = (*place, str(key.value)), key.start_mark.line + 1
            if (word := (key.tag, str(key.value))) in first:
                name = ".".join(str(part) for part in here)
                yield f"line {line}, {name}: given before in line {first[word]}; which one is meant?"
            first.setdefault(word, line)
            yield from _repeated_keys(value, here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _repeated_keys(value, (*place, number), seen)
