"""Collectives as Thakur et al. count them, Open MPI's choice among them, and what hides behind backward."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.plan.machine import Machine, Ready
from worker.plan.network import (
    NOTHING,
    Cluster,
    Cost,
    all_reduce,
    behind_backward,
    collective,
    rabenseifner,
    recursive_doubling,
)


@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_powers_of_two_cost_what_the_paper_says(rounds: int) -> None:
    processes = 2**rounds
    doubling, halving = recursive_doubling(processes), rabenseifner(processes)
    assert (doubling.messages, doubling.path, doubling.summed) == (rounds, rounds, rounds)
    assert halving.messages == 2 * rounds
    assert halving.path == pytest.approx(2 * (processes - 1) / processes)
    assert halving.summed == pytest.approx((processes - 1) / processes)
    # Everyone sends as much as anyone.
    assert doubling.sent == processes * doubling.path
    assert halving.sent == pytest.approx(processes * halving.path)


def test_processes_beyond_a_power_of_two_cost_more_than_without_them() -> None:
    for processes in range(3, 70):
        power = 1 << (processes.bit_length() - 1)
        for algorithm in (recursive_doubling, rabenseifner):
            if processes == power:
                continue
            more, fewer = algorithm(processes), algorithm(power)
            assert more.messages > fewer.messages
            assert more.path > fewer.path
            assert more.sent > fewer.sent
            assert more.summed > fewer.summed


def test_open_mpi_doubles_small_vectors_and_halves_large_ones() -> None:
    assert collective(4, 1000) == recursive_doubling(4)
    assert collective(4, 1e6) == rabenseifner(4)
    assert collective(128, 1000) == rabenseifner(128)
    assert collective(1, 1e6).messages == 0


def test_an_all_reduce_by_hand(machine: Machine, cluster: Cluster) -> None:
    # Four nodes, 4 MB: 2 x 3/4 x 4 MB at 10 MB/s, 3/4 x 4 MB summed at 0.1 ns a byte, four messages of 10 + 100 us.
    cost = all_reduce(machine, cluster, 4e6)
    assert cost.transfer_seconds == pytest.approx(0.6 + 0.0003)
    assert cost.latency_seconds == pytest.approx(4 * 1.1e-4)
    assert cost.sent_bytes == pytest.approx(6e6)
    # One medium carries what all four send.
    shared = all_reduce(machine, cluster._replace(shared_link=True), 4e6)
    assert shared.transfer_seconds == pytest.approx(4 * 0.6 + 0.0003)


def test_ranks_of_a_node_share_its_link_and_its_sums(machine: Machine, cluster: Cluster) -> None:
    cost = all_reduce(machine, cluster._replace(ranks_per_node=2), 4e6)
    assert cost.transfer_seconds == pytest.approx(0.6 + 0.0003 / 2)
    assert cost.sent_bytes == pytest.approx(6e6)


def test_a_link_faster_than_the_machine_leaves_the_machine(machine: Machine, cluster: Cluster) -> None:
    cost = all_reduce(machine, cluster._replace(bytes_per_second=1e15), 4e6)
    assert cost.transfer_seconds == pytest.approx(6e6 * 1e-10 + 0.0003)


@given(st.integers(2, 200), st.integers(1, 8), st.floats(1e3, 1e9), st.floats(1e5, 1e10), st.booleans())
def test_an_all_reduce_never_gets_cheaper_with_bytes_or_slower_links(nodes, ranks, size, rate, shared) -> None:
    from worker.plan.machine import Line

    machine = _plain_machine(Line(1e-5, 1e-10))
    cluster = Cluster(nodes, ranks, rate, 1e-4, shared)
    cost = all_reduce(machine, cluster, size)
    assert all_reduce(machine, cluster._replace(bytes_per_second=rate / 2), size).seconds >= cost.seconds
    large = max(size, 2e4 * ranks)  # beyond where Open MPI changes the algorithm
    assert all_reduce(machine, cluster, 2 * large).seconds >= all_reduce(machine, cluster, large).seconds
    assert all_reduce(machine, cluster._replace(nodes=1), size) == NOTHING


def test_only_the_front_of_the_vector_travels_in_the_open() -> None:
    ready = (Ready(1000, 0.5), Ready(1000, 1.0))
    # 4000 bytes a second each: the first bucket leaves at 0.5 of 4 s and takes 1 s, the second leaves at 4 s.
    cost = behind_backward(ready, 4.0, 4000, lambda size: Cost(size / 4000, 0.0, size))
    assert cost.seconds == pytest.approx(1.0)
    assert cost.sent_bytes == 8000
    # A slow link: the first is done at 2 + 10 s, the second behind it.
    assert behind_backward(ready, 4.0, 4000, lambda size: Cost(size / 400, 0.0, size)).seconds == pytest.approx(18.0)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    st.floats(0, 10),
    st.floats(100, 1e7),
    st.floats(1e3, 1e9),
)
def test_overlap_is_between_hiding_all_and_hiding_nothing(sizes, backward_seconds, bucket_bytes, rate) -> None:
    ready = [Ready(size, (index + 1) / len(sizes)) for index, size in enumerate(sizes)]
    whole = 4 * sum(sizes) / rate
    cost = behind_backward(ready, backward_seconds, bucket_bytes, lambda size: Cost(size / rate, 0.0, size))
    assert 0 <= cost.seconds <= whole * (1 + 1e-9) + 1e-9
    assert cost.seconds >= 4 * sizes[-1] / rate * (1 - 1e-9) - 1e-9
    assert math.isclose(cost.sent_bytes, 4 * sum(sizes), rel_tol=1e-9)


def _plain_machine(line):
    return Machine(2, 1, line, 0.5, (), 1e-9, 1e-10, 1e-6, line, line, 0)
