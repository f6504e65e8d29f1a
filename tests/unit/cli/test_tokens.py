"""`paceline token`, and the options by which verbs show a token."""

from __future__ import annotations

import json
import stat

import pytest

from protos.exit_codes import ExitCode


def test_a_token_is_printed_once_listed_without_its_secret_and_revoked(paceline, tmp_path):
    state = ("--state", str(tmp_path / "state"))
    made = paceline("token", "create", "ada", "--role", "submitter", "--expires", "30d", *state)
    assert made.code == ExitCode.DONE
    secret = made.out.strip()
    assert len(secret) >= 43
    listed = paceline("token", "list", "--format", "json", *state)
    (row,) = json.loads(listed.out)["tokens"]
    assert (row["name"], row["role"], row["state"], row["revoked"]) == ("ada", "submitter", "live", None)
    again = paceline("token", "create", "ada", "--role", "submitter", *state)
    assert again == (
        ExitCode.USAGE,
        "",
        "error: ada has a token: revoke it first (paceline token revoke ada)\n",
    )
    assert paceline("token", "revoke", "ada", *state).code == ExitCode.DONE
    assert " revoked " in paceline("token", "list", *state).out
    log = (tmp_path / "state" / "audit.jsonl").read_text()
    assert [json.loads(line)["call"] for line in log.splitlines()] == ["token create", "token revoke"]
    for path in (tmp_path / "state").iterdir():
        assert secret.encode() not in path.read_bytes()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "a b", "--role", "viewer"), "'a b' is no name for a token"),
        (("create", "ada", "--role", "boss"), "--role 'boss' is not one of: viewer, submitter, administrator"),
        (("create", "ada", "--role", "viewer", "--expires", "soon"), "--expires: 'soon' is no time such as 30d"),
        (("revoke", "ada"), "'ada' has no token to revoke"),
        (("list", "--store", "mysql://x"), "--store: 'mysql' is not postgresql"),
    ],
)
def test_what_cannot_be_is_one_line_and_2(paceline, tmp_path, arguments, words):
    done = paceline("token", *arguments, "--state", str(tmp_path / "state"))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert done.err.startswith(f"error: {words}")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--token-file", "{there}/none"), "--token-file: {there}/none cannot be read: No such file or directory"),
        (("--token-file", "{there}/two-lines"), "--token-file {there}/two-lines: holds no token"),
        (("--tls-ca", "{there}/two-lines"), "--tls-ca: {there}/two-lines holds no certificate in PEM"),
        (("--tls-key", "{there}/two-lines"), "--tls-certificate and --tls-key go together"),
    ],
)
def test_bad_credentials_are_one_line_and_2(paceline, tmp_path, arguments, words):
    (tmp_path / "two-lines").write_text("one\ntwo\n")
    done = paceline("list", *(argument.format(there=tmp_path) for argument in arguments))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert done.err.startswith(f"error: {words.format(there=tmp_path)}")
    assert len(done.err.splitlines()) == 1
