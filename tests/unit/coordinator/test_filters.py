"""The filter of a list, its page tokens, and what the command line makes of its options."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.faults import CommandFault
from coordinator.filters import FilterInvalid, Term, read_filter
from coordinator.listing import list_filter
from coordinator.pages import page_token, read_page_token

TEXT = st.text(max_size=30)


def test_a_filter_is_read_term_by_term() -> None:
    text = 'state=RUNNING AND labels.team != "vision" AND priority>=-5 AND owner="a \\"b\\" \\\\ AND c"'
    assert read_filter(text) == [
        Term("state", "=", "RUNNING"),
        Term("labels.team", "!=", "vision"),
        Term("priority", ">=", -5),
        Term("owner", "=", 'a "b" \\ AND c'),
    ]
    assert read_filter("  ") == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("state=DONE", "state 'DONE' is not one of: QUEUED, STARTING"),
        ("state>QUEUED", "state takes = and !=, not >"),
        ("name=x", "field 'name' is not one of: state, owner, priority, labels.NAME"),
        ("labels.=x", "'' is no label's name"),
        ("labels.-=x", "'-' is no label's name"),
        ("priority=high", "priority: 'high' is not a whole number"),
        ("state=RUNNING owner=x", "AND is expected at 'owner=x'"),
        ("state=RUNNING AND", "AND is expected at 'AND'"),
        ("state=RUNNING AND ", "a term such as state=RUNNING is expected at ''"),
        ("state=RUNNING OR state=QUEUED", "AND is expected at 'OR state=QUEUED'"),
        ('owner="x', "a term such as state=RUNNING is expected at 'owner=\"x'"),
        ("owner=" + "x" * 2000, "is longer than 2000 characters"),
    ],
)
def test_what_is_no_filter_says_where_and_what_is_allowed(text, fault) -> None:
    with pytest.raises(FilterInvalid) as error:
        read_filter(text)
    assert str(error.value).startswith(fault)


@given(TEXT)
def test_no_text_brings_anything_but_terms_or_a_fault_of_one_line(text) -> None:
    try:
        read_filter(text)
    except FilterInvalid as fault:
        assert len(str(fault).splitlines()) == 1  # noqa: PT017 - a filter is as good an outcome


@given(TEXT, st.lists(st.from_regex(r"[a-z]{1,5}=[^\0]{1,9}", fullmatch=True), max_size=3))
def test_what_the_command_line_puts_together_is_read_as_it_was_meant(owner, labels) -> None:
    terms = read_filter(list_filter("running", labels, owner, ""))
    wanted = [Term("state", "=", "RUNNING")]
    wanted += [Term(f"labels.{label.partition('=')[0]}", "=", label.partition("=")[2]) for label in labels]
    wanted += [Term("owner", "=", owner.replace("\0", ""))] if owner else []
    assert terms == wanted


def test_a_label_without_a_value_is_bad_usage() -> None:
    with pytest.raises(CommandFault, match="--label: 'team' is not NAME=VALUE"):
        list_filter("", ["team"], "", "")


@given(st.integers(0, 10**17), TEXT)
def test_a_page_token_says_where_to_go_on_for_its_own_filter_alone(before, text) -> None:
    token = page_token(before, text)
    assert read_page_token(token, text) == before
    with pytest.raises(ValueError, match="it was given for another filter"):
        read_page_token(token, text + "x")


@given(TEXT.filter(bool))
def test_no_text_is_taken_for_a_page_token(text) -> None:
    with pytest.raises(ValueError, match="is not one a response gave"):
        read_page_token(text, "")
