"""What is said of compression at the end of a job."""

import pytest

from worker.sync import compression_costs
from worker.sync.compression_costs import TRIAL_BYTES, Costs, best_bandwidth, line, uncompressed

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


def test_bandwidth_is_that_of_the_best_trial_and_a_slow_network_is_tried_few_times(monkeypatch) -> None:
    now, sent = [0.0], []

    def send(size: int) -> None:
        sent.append(size)
        now[0] += 1 + size / bytes_per_second

    monkeypatch.setattr(compression_costs, "perf_counter", lambda: now[0])
    bytes_per_second = 1e4
    assert best_bandwidth(send) == pytest.approx(65536 / (1 + 6.5536))
    assert sent == [1, 4096, 16384, 65536]
    monkeypatch.setattr(compression_costs, "BUDGET_SECONDS", 1000)
    assert best_bandwidth(send) == pytest.approx(TRIAL_BYTES / (1 + 26.2144))
    assert sent[-3:] == [TRIAL_BYTES] * 3


def test_a_process_that_has_to_wait_for_its_turn_now_and_then_does_not_make_the_network_slow(monkeypatch) -> None:
    """Nine of ten trials are held up by 20 ms, the first ones among them."""
    now, sent = [0.0], []

    def send(size: int) -> None:
        sent.append(size)
        now[0] += size / 1e9 + (0.02 if len(sent) % 10 else 0)

    monkeypatch.setattr(compression_costs, "perf_counter", lambda: now[0])
    assert best_bandwidth(send) == pytest.approx(1e9)


def test_peers_that_measure_together_count_the_slowest_of_them(monkeypatch) -> None:
    now = [0.0]

    def send(size: int) -> None:
        now[0] += size / 1e6

    monkeypatch.setattr(compression_costs, "perf_counter", lambda: now[0])
    assert best_bandwidth(send, lambda seconds: 2 * seconds) == pytest.approx(5e5)


def test_saved_time_is_counted_at_the_best_bandwidth_seen() -> None:
    costs = Costs(bytes_per_second=100)
    costs.coding_seconds = 4
    costs.sent(1000, seconds=5, float32_bytes=2000)  # 200 bytes/s
    costs.sent(100, seconds=50, float32_bytes=0)
    facts = costs.facts("int8")
    assert (facts["sent_bytes"], facts["float32_bytes"], facts["bytes_per_second"]) == (1100, 2000, 200)
    assert facts["saved_seconds"] == pytest.approx(4.5)
    assert facts["compression_paid"]
