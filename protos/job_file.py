"""Job files: YAML or JSON text <-> JobSpec.

Rules of this file:
- The schema (job.proto) decides what a word means and which fields there are; no field is known here by name.
- Every fault of a file is found in one reading: the tree is walked against the schema first, json_format is given only
  what is known good, and the rules are checked on that. A rule that is broken only because something faulty was left
  out is not reported beside the fault.
- Where a message with options is expected, a bare word stands for that option with its defaults; where a list of
  numbers or words is expected, one of them stands for a list of one (`kernel: 3`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from protos.job_pb2 import JobSpec
from protos.job_text import MAX_BYTES, Tree, Unreadable, read_text, write_text
from protos.labels import is_label, is_map
from protos.rules import (
    FLOATS,
    INTEGERS,
    Violation,
    check,
    choice_of,
    hint_of,
    option_words,
    resolve,
    rule_of,
    schema_of,
)
from protos.urls import is_url
from protos.wording import nearest, not_one_of, quoted


class JobFileInvalid(Exception):
    """The job file cannot be read or breaks the rules; `violations` holds every fault, str() gives one a line."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("\n".join(map(str, violations)))
        self.violations = list(violations)


def read_job_file(path: Path, settings: Sequence[str] = ()) -> JobSpec:
    """The job of a file with `settings` ("training.epochs=5") laid over it: resolved, checked, data paths absolute.

    Relative data paths are taken from the file's folder. JobFileInvalid names every fault at once.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise Unreadable(f"is larger than the {MAX_BYTES} bytes a job file may have")
        text = content.decode("utf-8-sig")
        return _parse(text, settings, path.absolute().parent)
    except OSError as error:
        fault = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
    except Unreadable as error:
        fault = str(error)
    raise JobFileInvalid([Violation(str(path), fault)])


def parse_job(text: str, settings: Sequence[str] = (), folder: Path | None = None) -> JobSpec:
    """As read_job_file, of text; without a folder data paths stay as they are."""
    try:
        return _parse(text, settings, folder)
    except Unreadable as error:
        raise JobFileInvalid([Violation("job file", str(error))]) from None


def to_yaml(spec: JobSpec) -> str:
    """The resolved job as a file a person could have written; parse_job(to_yaml(spec)) == resolve(spec)."""
    return write_text(to_dict(resolve(spec)))


def to_dict(spec: Message) -> dict[str, Any]:
    """The fields that are set, by their names in a job file; an option without settings is its bare word."""
    return {field.name: _plain(field, value) for field, value in spec.ListFields()}


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if is_map(field):
        return {name: value[name] for name in sorted(value)}
    if field.is_repeated:
        return [_plain_value(element) for element in value]
    return _plain_value(value)


def _plain_value(value: Any) -> Any:
    if not isinstance(value, Message):
        return value
    settings = to_dict(value)
    if choice_of(schema_of(value)) and len(settings) == 1:
        word, inner = next(iter(settings.items()))
        return settings if inner != {} else word
    return settings


# ------------------------------------------------------------------------------------------------------ text to a job


def _parse(text: str, settings: Sequence[str], folder: Path | None) -> JobSpec:
    tree, faults = read_text(text)
    if tree is None:
        raise Unreadable("is empty")
    if not isinstance(tree, dict):
        raise Unreadable(f"holds {_kind(tree)} where fields such as `model: ...` are expected")
    for setting in settings:
        faults.extend(_lay_over(tree, setting))
    reading = _Reading(faults)
    spec = json_format.ParseDict(reading.message(schema_of(JobSpec()), tree, ""), JobSpec())
    faults.extend(violation for violation in check(spec) if not reading.explains(violation.path))
    if faults:
        raise JobFileInvalid(faults)
    resolved = resolve(spec)
    if folder is not None:
        _make_paths_absolute(resolved, folder)
    return resolved


def _make_paths_absolute(message: Message, folder: Path) -> None:
    for field, value in message.ListFields():
        if rule_of(field).path:
            setattr(message, field.name, value if is_url(value) else os.path.join(folder, value))
        elif field.message_type is not None and not is_map(field):
            for part in value if field.is_repeated else [value]:
                _make_paths_absolute(part, folder)


def _kind(tree: Tree) -> str:
    return {dict: "a mapping", list: "a list", str: "a word", type(None): "nothing"}[type(tree)]


# ----------------------------------------------------------------------------------------------------------- settings

_SETTING = re.compile(r"(?P<path>\w+(?:\.\w+|\[\d+\])*)=(?P<value>.*)", re.DOTALL)


def _lay_over(tree: dict[str, Tree], setting: str) -> Iterator[Violation]:
    """Write one `path=value` into the tree; a path the schema does not know is found when the tree is walked."""
    parts = _SETTING.fullmatch(setting)
    if not parts:
        yield Violation(f"--set {setting}", "is not of the form training.epochs=5 or model[0].dense.units=64")
        return
    try:
        value, twice = read_text(parts["value"])
    except Unreadable as error:
        yield Violation(f"--set {setting}", str(error))
        return
    yield from (Violation(f"--set {setting}", str(fault)) for fault in twice)
    steps = re.findall(r"\w+", parts["path"])
    here: Tree = tree
    place = ""
    for step, last in zip(steps, [False] * (len(steps) - 1) + [True], strict=True):
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                yield Violation(f"{place}[{step}]", f"--set reaches past {place}, which has {len(here)} entries")
                return
            place = f"{place}[{int(step)}]"
            here = _step_into(here, int(step), value, last)
        elif isinstance(here, dict):
            place = f"{place}.{step}" if place else step
            here = _step_into(here, step, value, last)


def _step_into(holder: Any, key: str | int, value: Tree, last: bool) -> Tree:
    """Replace the value at the path's end; on the way, make the mapping that an absent value or a word stands for."""
    if last:
        holder[key] = value
        return None
    inner: Tree = holder[key] if isinstance(key, int) else holder.get(key)
    if inner is None or isinstance(inner, str):
        inner = {} if inner is None else {inner: None}
        holder[key] = inner
    return inner


# ------------------------------------------------------------------------------------------- the tree and the schema

_NO_VALUE = object()  # of a field whose value was faulty
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class _Reading:
    """One walk of a tree against the schema: the dict json_format can take, and every fault met on the way."""

    def __init__(self, faults: list[Violation]) -> None:
        self.faults = faults
        self.explained: set[str] = set()  # where something is missing because what stood there was faulty

    def explains(self, path: str) -> bool:
        """Whether a rule broken at `path` follows from a fault at, above or beneath it."""
        return any(path == known or _beneath(path, known) or _beneath(known, path) for known in self.explained)

    def fault(self, path: str, message: str) -> Any:
        self.faults.append(Violation(path, message))
        self.explained.add(path)
        return _NO_VALUE

    def message(self, descriptor: Descriptor, tree: Tree, path: str) -> dict[str, Any]:
        words = option_words(descriptor)
        if tree is None:
            return {}
        if isinstance(tree, str) and words:
            if tree not in words:
                self.fault(path, not_one_of(tree, words, hint_of(descriptor, tree)))
                return {}
            tree = {tree: None}
        if not isinstance(tree, dict):
            self.fault(path, f"holds {_kind(tree)} where a mapping of these is expected: {_names(descriptor)}")
            return {}
        given = [word for word in words if word in tree]
        if len(given) > 1:
            self.fault(path, f"names {' and '.join(given)}; it takes one of: {', '.join(words)}")
            tree = {name: value for name, value in tree.items() if name not in given[1:]}
        read = {name: self.entry(descriptor, name, value, path) for name, value in tree.items()}
        return {name: value for name, value in read.items() if value is not _NO_VALUE}

    def entry(self, descriptor: Descriptor, name: str, tree: Tree, path: str) -> Any:
        field = descriptor.fields_by_name.get(name)
        shown = name if name.isidentifier() else quoted(name)
        place = f"{path}.{shown}" if path else shown
        if field is None:
            near = nearest(name, descriptor.fields_by_name)
            if near:
                self.explained.add(f"{path}.{near}" if path else near)
            hint = hint_of(descriptor, name) or (f"did you mean {near}?" if near else "")
            return self.fault(place, f"is unknown; known here: {_names(descriptor)}" + (f"; {hint}" if hint else ""))
        if is_map(field):
            return self.texts(field, tree, place)
        if field.is_repeated:
            return self.elements(field, tree, place)
        if tree is None and name in option_words(descriptor):
            # `- relu:` names the option; what is no message has no defaults to stand for.
            return {} if field.message_type else self.fault(place, f"needs a value{_such_as(field)}")
        return _NO_VALUE if tree is None else self.value(field, tree, place)

    def texts(self, field: FieldDescriptor, tree: Tree, place: str) -> Any:
        if tree is None:
            return _NO_VALUE
        if not isinstance(tree, dict):
            return self.fault(place, f"holds {_kind(tree)} where names with a text each are expected")
        entry = cast(Descriptor, field.message_type)
        of_names, of_texts = entry.fields_by_name["key"], entry.fields_by_name["value"]
        read = {
            name: self.value(of_texts, text, f"{place}.{name if is_label(name) else quoted(name)}")
            for name, text in tree.items()
            if self.value(of_names, name, place) is not _NO_VALUE
        }
        return {name: text for name, text in read.items() if text is not _NO_VALUE}

    def elements(self, field: FieldDescriptor, tree: Tree, place: str) -> Any:
        if tree is None:
            return _NO_VALUE
        if isinstance(tree, str) and field.message_type is None:
            tree = [tree]
        if not isinstance(tree, list):
            return self.fault(place, f"holds {_kind(tree)} where a list is expected")
        # A faulty message leaves an empty one behind, so that the entries after it keep their numbers.
        read = [self.value(field, element, f"{place}[{index}]") for index, element in enumerate(tree)]
        return [element for element in read if element is not _NO_VALUE]

    def value(self, field: FieldDescriptor, tree: Tree, place: str) -> Any:
        if field.message_type is not None:
            return self.message(field.message_type, tree, place)
        if not isinstance(tree, str):
            return self.fault(place, f"holds {_kind(tree)} where {_EXPECTED[field.cpp_type]} is expected")
        if field.cpp_type in INTEGERS:
            return self.integer(field, tree, place)
        if field.cpp_type in FLOATS:
            return self.number(tree, place)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            given = _BOOLEANS.get(tree.lower())
            return self.fault(place, f"{quoted(tree)} is not true or false") if given is None else given
        if any("\ud800" <= character <= "\udfff" for character in tree):
            return self.fault(place, f"{quoted(tree)} holds half of a character (a lone surrogate)")
        return tree

    def integer(self, field: FieldDescriptor, text: str, place: str) -> Any:
        number: float = int(text) if _INTEGER.fullmatch(text) else self.number(text, place, "a whole number")
        if number is _NO_VALUE:
            return _NO_VALUE
        if number != int(number):
            return self.fault(place, f"{_shortened(text)} is not a whole number")
        low, high = _INTEGER_LIMITS[field.cpp_type]
        if not low <= number <= high:
            bound = f"at least {low}" if number < low else f"at most {high}"
            return self.fault(place, f"{_shortened(text)} is not {bound}")
        return int(number)

    def number(self, text: str, place: str, expected: str = "a number") -> Any:
        if not _NUMBER.fullmatch(text):
            return self.fault(place, f"{quoted(text)} is not {expected}")
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return number if math.isfinite(number) else self.fault(place, f"{_shortened(text)} is not a finite number")


_EXPECTED = {
    **dict.fromkeys(INTEGERS, "a whole number"),
    **dict.fromkeys(FLOATS, "a number"),
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a text",
}


def _names(descriptor: Descriptor) -> str:
    return ", ".join(descriptor.fields_by_name) or "nothing, it has no settings"


def _shortened(digits: str) -> str:
    return digits if len(digits) <= 60 else quoted(digits)


def _such_as(field: FieldDescriptor) -> str:
    words = rule_of(field).one_of
    return f", one of: {', '.join(words)}" if words else ""


def _beneath(path: str, ancestor: str) -> bool:
    return path.startswith((f"{ancestor}.", f"{ancestor}["))
