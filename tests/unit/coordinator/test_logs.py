"""Reading log files while they grow."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from coordinator.logs import LINE_BYTES, follow_logs, read_logs

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=20)


def lines_of(folder: Path, rank: int | None = None) -> list[str]:
    return [f"{source}: {line}" for source, line in read_logs(folder, rank)]


def test_the_launcher_comes_first_and_then_the_ranks_in_their_order(tmp_path: Path) -> None:
    for name in ("rank-10", "rank-2", "launcher", "rank-0"):
        (tmp_path / f"{name}.log").write_text(f"I am {name}\n")
    (tmp_path / "rank-2.log.old").write_text("not a log\n")
    (tmp_path / "rank-x.log").write_text("not a log\n")
    assert lines_of(tmp_path) == [
        "launcher: I am launcher",
        "rank-0: I am rank-0",
        "rank-2: I am rank-2",
        "rank-10: I am rank-10",
    ]
    assert lines_of(tmp_path, rank=2) == ["rank-2: I am rank-2"]
    assert lines_of(tmp_path, rank=3) == []


def test_a_job_that_never_started_has_no_lines(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "logs") == []


@given(st.lists(LINE, min_size=1, max_size=6), st.data())
def test_every_line_comes_whole_and_once_however_the_writing_is_cut(lines, data) -> None:
    content = "\n".join(lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/rank-0.log", "ab", buffering=0) as file:

        def write_more() -> bool:
            file.write(pieces.pop(0))
            return True

        found = [line for _, line in follow_logs(Path(folder), None, lambda: not pieces, write_more)]
    assert found == (lines if lines[-1] else lines[:-1])


def test_following_finds_the_log_of_a_rank_that_appears_later(tmp_path: Path) -> None:
    rounds = iter((True, True))

    def pause() -> bool:
        (tmp_path / "rank-1.log").write_text("here I am")
        return next(rounds)

    ended = iter((False, True))
    assert list(follow_logs(tmp_path, None, lambda: next(ended), pause)) == [("rank-1", "here I am")]


def test_following_stops_when_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("one\ntwo without an end")
    assert [line for _, line in follow_logs(tmp_path, None, lambda: False, lambda: False)] == ["one"]


def test_a_line_too_long_to_hold_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_bytes(b"x" * (2 * LINE_BYTES + 5) + b"\nshort\n" + b"y" * 300_000)
    found = [line for _, line in read_logs(tmp_path, None)]
    assert [len(line) for line in found[:4]] == [LINE_BYTES, LINE_BYTES, 5, 5]
    assert max(map(len, found)) == LINE_BYTES
    assert "".join(found[4:]) == "y" * 300_000


def test_bytes_that_are_no_text_are_shown_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_bytes(b"\xff\xfe\r\n")
    (tmp_path / "rank-1.log").symlink_to("/etc/passwd")
    assert lines_of(tmp_path) == ["rank-0: \\xff\\xfe"]
