"""What holds of every job file, over random valid jobs and random trees, both drawn from the schema itself."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import ParseDict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from protos import rules
from protos.job_file import JobFileInvalid, parse_job, to_dict, to_yaml
from protos.job_pb2 import JobSpec
from protos.labels import is_map

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def valid_value(field: FieldDescriptor, above: tuple[Descriptor, ...]) -> st.SearchStrategy[Any]:
    rule = rules.rule_of(field)
    if is_map(field):
        labels = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,9}[A-Za-z0-9])?", fullmatch=True)
        return st.dictionaries(labels, labels, min_size=1, max_size=4)
    if field.message_type is not None:
        return valid_message(field.message_type, above)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return (
            st.sampled_from(list(rule.one_of)) if rule.one_of else TEXT.filter(lambda text: text or not rule.required)
        )
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    low = rule.at_least if rule.HasField("at_least") else rule.above if rule.HasField("above") else -1e300
    high = rule.at_most if rule.HasField("at_most") else rule.below if rule.HasField("below") else 1e300
    if field.cpp_type in rules.FLOATS:
        return st.floats(low, high, exclude_min=rule.HasField("above"), exclude_max=rule.HasField("below"))
    width = 31 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 63
    return st.integers(math.ceil(max(low, -(2.0**width))), min(int(high), 2**width - 1))


def valid_message(descriptor: Descriptor, above: tuple[Descriptor, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Dicts as json_format takes them. Layers hold layers: within one, those that do are left out."""
    words = rules.option_words(descriptor)
    open_words = [word for word in words if descriptor.fields_by_name[word].message_type not in above]
    above = (*above, descriptor)
    entries: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if field.name in words:
            continue
        value = valid_value(field, above)
        if field.is_repeated and not is_map(field):
            value = st.lists(value, min_size=1, max_size=4)
        (entries if rules.rule_of(field).required else optional)[field.name] = value
    plain = st.fixed_dictionaries(entries, optional=optional)
    if not words:
        return plain
    fields = {word: descriptor.fields_by_name[word] for word in open_words}
    chosen = st.one_of([st.fixed_dictionaries({word: valid_value(field, above)}) for word, field in fields.items()])
    return st.builds(lambda settings, choice: {**settings, **choice}, plain, chosen)


TREES_OF_JOBS = valid_message(rules.schema_of(JobSpec()))


@st.composite
def valid_specs(draw: st.DrawFn) -> JobSpec:
    tree = draw(TREES_OF_JOBS)
    data = tree["data"]
    if "validation" in data:
        data.pop("validation_fraction", None)
    if data.get("standardize"):
        data.pop("scale", None)
    if "validation" not in data and not data.get("validation_fraction"):
        tree.get("schedule", {}).pop("reduce_on_plateau", None)
        for watching in ("early_stopping", "keep_best"):
            tree.get("training", {}).pop(watching, None)
    if tree.get("training", {}).get("clip_norm"):
        tree["training"].pop("clip_value", None)
    spec = ParseDict(tree, JobSpec())
    assume(not rules.check(spec))  # what is left: an activation the loss holds itself
    return spec


@quick
@given(valid_specs())
def test_a_resolved_job_reads_back_as_it_was_written(spec: JobSpec) -> None:
    resolved = rules.resolve(spec)
    assert rules.check(resolved) == []
    assert parse_job(to_yaml(resolved)) == resolved
    assert parse_job(to_yaml(spec)) == resolved


@quick
@given(valid_specs())
def test_yaml_and_json_of_a_job_mean_the_same(spec: JobSpec) -> None:
    assert parse_job(json.dumps(to_dict(spec))) == rules.resolve(spec)
    assert parse_job(json.dumps(to_dict(spec), ensure_ascii=False, indent="\t")) == rules.resolve(spec)


@quick
@given(valid_specs())
def test_any_yaml_reader_sees_the_values_of_the_resolved_job(spec: JobSpec) -> None:
    assert yaml.safe_load(to_yaml(spec)) == to_dict(rules.resolve(spec))


def field_names(descriptor: Descriptor, above: tuple[Descriptor, ...] = ()) -> set[str]:
    below = [field.message_type for field in descriptor.fields if field.message_type not in (None, *above)]
    parts = (field_names(message, (*above, descriptor)) for message in below)
    return set(descriptor.fields_by_name).union(*parts)


VALUES = ["digits", "1e-3", "-1", "3.5", "nan", "true"]
WORDS = st.sampled_from(sorted(field_names(rules.schema_of(JobSpec()))) + VALUES)
TREES = st.recursive(
    st.one_of(WORDS, TEXT, st.none(), st.booleans(), st.integers(), st.floats(), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(WORDS, TEXT), inner, max_size=5)),
    max_leaves=20,
)


@quick
@given(st.dictionaries(st.one_of(WORDS, TEXT), TREES, max_size=6))
def test_no_tree_brings_anything_but_a_job_or_violations_of_one_line_each(tree: dict[str, Any]) -> None:
    for text in (json.dumps(tree), yaml.safe_dump(tree)):
        try:
            parse_job(text)
        except JobFileInvalid as invalid:
            assert invalid.violations  # noqa: PT017 - a valid job is as good an outcome
            assert len(str(invalid).splitlines()) == len(invalid.violations)  # noqa: PT017


@quick
@given(st.text(max_size=60))
def test_no_text_brings_anything_but_a_job_or_violations(text: str) -> None:
    try:
        parse_job(text, [text, f"training.epochs={text}"])
    except JobFileInvalid as invalid:
        assert invalid.violations  # noqa: PT017


@quick
@given(valid_specs(), st.data())
def test_a_setting_of_any_number_is_as_good_as_a_line_of_the_file(spec: JobSpec, data: st.DataObject) -> None:
    epochs = data.draw(st.integers(1, 2**31 - 1))
    changed = parse_job(to_yaml(spec), [f"training.epochs={epochs}"])
    expected = rules.resolve(spec)
    expected.training.epochs = epochs
    assert changed == expected
