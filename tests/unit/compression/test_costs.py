"""What is said of compression at the end of a job."""

from worker.sync.compression_costs import line, uncompressed

MEASURED = {
    "wire_format": "int8", "sent_bytes": 25_000_000, "float32_bytes": 100_000_000, "coding_seconds": 1.5,
    "bytes_per_second": 12.5e6, "saved_seconds": 6.0, "compression_paid": True,
}  # fmt: skip


def test_the_line_says_what_was_sent_what_it_took_and_whether_it_paid() -> None:
    assert line(MEASURED) == (
        "wire format int8: sent 25 MB where float32 sends 100 MB (4.0 times less); coding took 1.5 s and saved about "
        "6 s at the 12.5 MB/s measured: it paid"
    )
    worse = MEASURED | {"saved_seconds": 1.0, "compression_paid": False}
    assert str(line(worse)).endswith("measured: it cost more than it saved: use wire_format: float32 here")


def test_nothing_is_said_where_nothing_was_asked_for() -> None:
    assert line({}) is None
    assert line({"bucket_bytes": 7}) is None


def test_one_node_alone_is_told_that_nothing_was_compressed() -> None:
    assert "one node alone" in str(line(uncompressed("sign")))
