"""Text that is damaged or meant to harm: one clear message, at little cost, and nothing but JobFileInvalid."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from protos.job_file import JobFileInvalid, parse_job, read_job_file
from protos.job_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES

MAX_SECONDS = 10.0  # generous for a busy machine; each refusal takes about one second or far less


def refusal(text: str) -> str:
    started = time.monotonic()
    with pytest.raises(JobFileInvalid) as caught:
        parse_job(text)
    assert time.monotonic() - started < MAX_SECONDS
    (violation,) = caught.value.violations
    assert "\n" not in str(violation)
    return str(violation)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "null"])
def test_an_empty_file_is_called_empty(text: str) -> None:
    assert refusal(text) == "job file: is empty"


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "a list"), ("hello", "a word"), ("[{}]", "a list")])
def test_a_file_that_is_no_mapping_says_what_it_holds(text: str, kind: str) -> None:
    assert refusal(text) == f"job file: holds {kind} where fields such as `model: ...` are expected"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmodel: [\n", "job file: line 3, column 1: "),
        ("name: a: b\n", "job file: line 1, column 8: mapping values are not allowed here"),
        ("\tname: x\n", "job file: line 1, column 1: found character '\\t' that cannot start any token"),
        ("name: x\n---\nname: y\n", "job file: line 2, column 1: but found another document"),
        ("name: *nothing\n", "job file: line 1, column 7: found undefined alias 'nothing'"),
        ("name: \x00\n", "job file: unacceptable character #x0000: "),
        ('{"name": "x",', "job file: line 1, column 14: "),
        ("[a]: b\n", "job file: line 1, column 1: a key must be a word"),
    ],
)
def test_damaged_text_is_refused_with_its_line(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['true']", "!!int 5", "! x", "!mine {}", "!!binary aGk="]
)
def test_tags_are_refused(value: str) -> None:
    assert "has no place in a job file; remove it" in refusal(f"name: {value}\n")


@pytest.mark.parametrize(
    ("text", "path", "lines"),
    [
        ("workers: 1\nname: x\nworkers: 2\n", "workers", "1 and 3"),
        ("training:\n  epochs: 1\n  epochs: 1\n", "training.epochs", "2 and 3"),
        ("model:\n- relu: {}\n  relu: {}\n", "model[0].relu", "2 and 3"),
    ],
)
def test_a_key_given_twice_is_a_violation_with_its_lines_beside_the_others(text: str, path: str, lines: str) -> None:
    with pytest.raises(JobFileInvalid) as caught:
        parse_job(text)
    assert str(caught.value.violations[0]) == f"{path}: is given twice, on lines {lines}"
    assert "optimizer" in {violation.path for violation in caught.value.violations}


def test_a_key_given_twice_in_json_is_a_violation() -> None:
    with pytest.raises(JobFileInvalid, match=r"^training.epochs: is given twice\n"):
        parse_job('{"training": {"epochs": 1, "epochs": 2}}')


@pytest.mark.parametrize("pair", ["[*a{0}, *a{0}]", "{{l: *a{0}, r: *a{0}}}"], ids=["lists", "mappings"])
def test_aliases_that_grow_without_end_are_refused(pair: str) -> None:
    doublings = "".join(f"k{n}: &a{n + 1} {pair.format(n)}\n" for n in range(25))
    assert refusal(f"k: &a0 [x]\n{doublings}") == f"job file: holds more than {MAX_VALUES} values, aliases expanded"


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_an_alias_inside_itself_is_refused(text: str) -> None:
    assert refusal(text) == f"job file: is nested more than {MAX_DEPTH} deep"


@pytest.mark.parametrize("opening", ["[", "{a: ", '{"a":', "- ", "{? "])
def test_endless_nesting_is_refused(opening: str) -> None:
    assert f"is nested more than {MAX_DEPTH} deep" in refusal(opening * (MAX_BYTES // 2 // len(opening)))


def test_deep_json_is_refused_whole_or_not() -> None:
    for depth in (MAX_DEPTH + 1, 100_000):
        text = '{"a":' * depth + "1" + "}" * depth
        assert f"is nested more than {MAX_DEPTH} deep" in refusal(text)


def test_too_many_values_are_refused_long_before_the_end() -> None:
    assert f"holds more than {MAX_VALUES} values" in refusal("model: [" + "relu, " * 150_000)
    assert f"holds more than {MAX_VALUES} values" in refusal('{"model": [' + "0, " * MAX_VALUES + "0]}")


def test_a_text_or_file_beyond_a_mebibyte_is_refused_unparsed(tmp_path: Path) -> None:
    assert refusal("#" * (MAX_BYTES + 1)) == "job file: is longer than the 1048576 characters a job file may have"
    job = tmp_path / "job.yaml"
    job.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(JobFileInvalid, match="is larger than the 1048576 bytes a job file may have"):
        read_job_file(job)


def test_a_long_number_is_refused_without_being_computed() -> None:
    digits = "9" * 1_000_000
    with pytest.raises(JobFileInvalid) as caught:
        parse_job(f"workers: {digits}\ntraining: {{seed: {digits[:399]}}}\n")
    for violation in caught.value.violations:
        assert len(str(violation)) < 300


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(JobFileInvalid) as caught:
        read_job_file(missing)
    assert str(caught.value) == f"{missing}: cannot be read: No such file or directory"
    with pytest.raises(JobFileInvalid, match="cannot be read: Is a directory"):
        read_job_file(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    with pytest.raises(JobFileInvalid, match="is not UTF-8 text: byte 6 is 0xff"):
        read_job_file(binary)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "data: {train: {built_in: digits}}\nmodel: [dense: {units: 10}]\nloss: mean_squared_error\noptimizer: sgd\n",
        encoding="utf-8-sig",
    )
    assert read_job_file(job).optimizer.WhichOneof("kind") == "sgd"
