"""Text of a job file <-> a tree of words.

Rules of this file:
- A tree is dict, list, text or None. Every scalar stays the text the person wrote, in YAML and in JSON alike: what it
  means is for the field it stands in to say. So `1e-3` is a number and `name: no` is a name, whatever YAML 1.1 thinks.
- A job file is data from someone else: size, depth and the growth of aliases are bounded, tags are refused, nothing
  is constructed.
- A key written twice is reported, never silently decided.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import yaml

from protos.rules import Violation
from protos.wording import quoted

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000  # a model of a thousand layers needs 6,000

Tree: TypeAlias = "dict[str, Tree] | list[Tree] | str | None"
_NULLS = ("", "~", "null", "Null", "NULL")


class Unreadable(Exception):
    """The text is not YAML or JSON, or goes beyond the limits; the message says where."""


def read_text(text: str) -> tuple[Tree, list[Violation]]:
    """The tree of a YAML or JSON text and a violation for each key written twice; Unreadable where it has no tree."""
    if len(text) > MAX_BYTES:
        raise Unreadable(f"is longer than the {MAX_BYTES} characters a job file may have")
    try:
        raw = _raw_json(text) if text.lstrip().startswith("{") else _raw_yaml(text)
    except RecursionError:
        raise Unreadable(f"is nested more than {MAX_DEPTH} deep") from None
    return _Settler().settle(raw)


def write_text(tree: dict[str, Any]) -> str:
    """YAML of plain values, one line for each innermost mapping, keys in the order given."""

    def dump(readable: bool) -> str:
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=readable, width=120)

    # PyYAML folds these three line breaks into spaces when it may leave them unescaped.
    text = dump(readable=True)
    return dump(readable=False) if any(mark in text for mark in "\x85\u2028\u2029") else text


# ------------------------------------------------------------------------------------------------------------ parsing


class _Mapping(list[tuple[str, Any, int | None]]):
    """Keys, values and line numbers (None for JSON) as written, before twice-written keys are looked for."""


def _raw_json(text: str) -> Any:
    """JSON first, since YAML refuses its tabs; then YAML, whose flow mappings also begin with a brace."""
    try:
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _Mapping((key, value, None) for key, value in pairs),
            parse_int=str,
            parse_float=str,
            parse_constant=str,
        )
    except json.JSONDecodeError:
        return _raw_yaml(text)


def _raw_yaml(text: str) -> Any:
    try:
        loader = _BoundedLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise Unreadable(f"{_line(error.problem_mark or error.context_mark)}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())) from None
    return _raw_node(node, {})


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes and no objects; counts as it goes, so that a hostile text costs little before it is refused."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves the parser untyped
        if getattr(event, "tag", None):
            raise Unreadable(f"{_line(event.start_mark)}the tag {event.tag} has no place in a job file; remove it")
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"{_line(event.start_mark)}is nested more than {MAX_DEPTH} deep")
        if self.values > MAX_VALUES:
            raise Unreadable(f"{_line(event.start_mark)}holds more than {MAX_VALUES} values")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _line(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _raw_node(node: yaml.Node | None, seen: dict[int, Any]) -> Any:
    """Words, lists and mappings of a node; an alias gives the same object again, so that a bomb is not yet expanded."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return None if node is None or (node.style is None and node.value in _NULLS) else node.value
    if id(node) not in seen:
        if isinstance(node, yaml.SequenceNode):
            elements: list[Any] = []
            seen[id(node)] = elements
            elements.extend(_raw_node(element, seen) for element in node.value)
        else:
            pairs = _Mapping()
            seen[id(node)] = pairs
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise Unreadable(f"{_line(key.start_mark)}a key must be a word")
                pairs.append((key.value, _raw_node(value, seen), key.start_mark.line + 1))
    return seen[id(node)]


# ----------------------------------------------------------------------------------------------------------- settling


class _Settler:
    """Copies what was parsed into a tree, within the limits; collects the keys written twice."""

    def __init__(self) -> None:
        self.values = 0
        self.twice: list[Violation] = []

    def settle(self, raw: Any) -> tuple[Tree, list[Violation]]:
        return self._copy(raw, "", 0), self.twice

    def _copy(self, raw: Any, path: str, depth: int) -> Tree:
        self.values += 1
        if depth > MAX_DEPTH:
            raise Unreadable(f"is nested more than {MAX_DEPTH} deep")
        if self.values > MAX_VALUES:
            raise Unreadable(f"holds more than {MAX_VALUES} values, aliases expanded")
        if isinstance(raw, _Mapping):
            return self._copy_mapping(raw, path, depth)
        if isinstance(raw, list):
            return [self._copy(element, f"{path}[{index}]", depth + 1) for index, element in enumerate(raw)]
        return str(raw).lower() if isinstance(raw, bool) else raw

    def _copy_mapping(self, raw: _Mapping, path: str, depth: int) -> dict[str, Tree]:
        settled: dict[str, Tree] = {}
        first_lines: dict[str, int | None] = {}
        for key, value, line in raw:
            place = f"{path}.{key}" if path else key
            if key in settled:
                where = f", on lines {first_lines[key]} and {line}" if line else ""
                self.twice.append(Violation(place if key.isidentifier() else quoted(key), f"is given twice{where}"))
                continue
            first_lines[key] = line
            settled[key] = self._copy(value, place, depth + 1)
        return settled
