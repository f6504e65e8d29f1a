"""Tokens of a job's workers."""

import pytest

from coordinator.auth import bearer_token, digest_of, matches, new_token


def test_a_token_matches_its_own_digest_alone() -> None:
    token, other = new_token(), new_token()
    assert matches(token.secret, token.digest)
    assert not matches(other.secret, token.digest)
    assert not matches("", token.digest)
    assert not matches("é" * 43, token.digest)


def test_a_job_without_a_live_token_takes_none() -> None:
    assert not matches(new_token().secret, None)
    assert not matches("", None)


def test_what_is_stored_is_not_the_token() -> None:
    token = new_token()
    assert token.secret not in token.digest
    assert token.digest == digest_of(token.secret)
    assert len(token.secret) >= 43  # 256 bits in base 64


@pytest.mark.parametrize(
    ("metadata", "token"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("user-agent", "grpc"), ("Authorization", "bearer abc ")], "abc"),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Basic abc")], None),
        ([("authorization-bin", b"Bearer abc")], None),
        ([], None),
    ],
)
def test_the_token_is_read_from_the_authorization_entry(metadata, token) -> None:
    assert bearer_token(metadata) == token
