"""What hosts tell each other of their ranks: datagrams written and read, with invented clocks."""

import numpy as np

from worker.beat import FIELDS, Beat, read
from worker.sync.distant_beats import TOKEN_BYTES, pack, unpack

TOKEN = bytes(range(TOKEN_BYTES))
AGE_SECONDS = 2.0


def beat(rank: int, step: int, phase: str) -> np.ndarray:
    segment = np.zeros(FIELDS)
    own = Beat(rank, 4711 + rank)
    own.move(segment)
    own.step(step, 2)
    own.phase(phase)
    return segment


def test_what_a_host_sends_another_reads_by_its_own_clock() -> None:
    segments = [beat(2, 7, "forward"), beat(3, 8, "exchange")]
    sent_at = max(read(segment).since for segment in segments) + AGE_SECONDS
    rows = unpack(TOKEN, pack(TOKEN, segments, sent_at), 4, now=1000.0)
    assert rows is not None
    for row, segment in zip(rows, segments, strict=True):
        found, own = read(row), read(segment)
        assert found._replace(since=0, alive=0) == own._replace(since=0, alive=0)
        np.testing.assert_allclose(
            [1000.0 - found.since, 1000.0 - found.alive], sent_at - np.array([own.since, own.alive])
        )


def test_what_is_not_of_this_job_is_ignored() -> None:
    data = pack(TOKEN, [beat(2, 7, "forward")], 0.0)
    assert unpack(TOKEN, data, 4, 0.0) is not None
    assert unpack(bytes(TOKEN_BYTES), data, 4, 0.0) is None  # another token
    assert unpack(TOKEN, data, 2, 0.0) is None  # a rank that the job does not have
    for broken in (b"", TOKEN, data[:-1], data + b"\0", TOKEN + np.full(FIELDS, np.nan).tobytes()):
        assert unpack(TOKEN, broken, 4, 0.0) is None
