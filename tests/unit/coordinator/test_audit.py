"""The audit log: what a line holds, who may read it, and that it stays bounded."""

import json
import os

from coordinator.audit import AuditLog, Deed


def lines(path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_did_what_when_from_where_and_what_came_of_it(tmp_path, noon) -> None:
    AuditLog(tmp_path, lambda: noon).write(Deed("CancelJob", "ada", "submitter", "digits-1", "ipv4:10.0.0.1:5", "OK"))
    assert lines(tmp_path / "audit.jsonl") == [
        {
            "time": "2026-01-02T12:00:00.123+00:00",
            "call": "CancelJob",
            "who": "ada",
            "role": "submitter",
            "job": "digits-1",
            "from": "ipv4:10.0.0.1:5",
            "outcome": "OK",
        }
    ]
    assert os.stat(tmp_path / "audit.jsonl").st_mode & 0o777 == 0o600


def test_what_a_caller_chose_makes_no_line_of_its_own_and_no_long_one(tmp_path, noon) -> None:
    log = AuditLog(tmp_path, lambda: noon)
    log.write(Deed("GetJob", None, None, 'x\n{"who": "forged"}' + "x" * 100_000, "here", "NOT_FOUND"))
    (line,) = lines(tmp_path / "audit.jsonl")
    assert len(line["job"]) == 200


def test_files_are_kept_up_to_their_number_and_size_and_the_newest_lines_are_in_them(tmp_path, noon) -> None:
    log = AuditLog(tmp_path, lambda: noon, file_bytes=1000, kept=2)
    for number in range(100):
        log.write(Deed("CancelJob", "ada", "submitter", f"job-{number}", "here", "OK"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    found = [line["job"] for name in reversed(names) for line in lines(tmp_path / name)]
    assert found == [f"job-{number}" for number in range(100)][-len(found) :]
    assert len(found) > 10
    assert all((tmp_path / name).stat().st_size <= 1000 for name in names)


def test_those_nobody_knows_push_out_no_known_callers_deed(tmp_path, noon) -> None:
    log = AuditLog(tmp_path, lambda: noon, file_bytes=500, kept=1)
    log.write(Deed("CancelJob", "ada", "submitter", "mine", "here", "OK"))
    for _ in range(50):
        log.write(Deed("CancelJob", None, None, "x", "there", "UNAUTHENTICATED", "TokenNotGood", known=False))
    assert [line["job"] for line in lines(tmp_path / "audit.jsonl")] == ["mine"]


def test_a_link_in_its_place_is_not_written_through_and_holds_nobody_up(tmp_path, noon, caplog) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    AuditLog(tmp_path, lambda: noon).write(Deed("CancelJob", "ada", "submitter", "mine", "here", "OK"))
    assert (tmp_path / "elsewhere").read_text() == ""
    assert "cannot be written" in caplog.text
