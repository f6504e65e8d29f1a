"""A step's cost: equal to what is worked out by hand, right in its limits, and never against common sense."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.plan.choices import Choice, WireFormat
from worker.plan.machine import Line, Machine, Ready, Workload
from worker.plan.network import PAYLOAD_SHARE, Cluster
from worker.plan.prediction import Practice, one_node, predict

PLAIN = Practice(buckets=False)
HALF = WireFormat("float16", 2.0, 1e-9, 5e-10, sums_well=True)
FACTORED = WireFormat("power_sgd", 3.8, 2e-9, 1e-9, sums_well=True, factors=(0.5, 0.45))
CHOICES = [
    Choice("all_reduce"),
    Choice("all_reduce", HALF),
    Choice("all_reduce", FACTORED),
    Choice("parameter_server"),
    Choice("parameter_server", HALF, servers=2),
    Choice("local", steps=8),
]


def test_an_all_reduce_step_by_hand(machine: Machine, work: Workload, cluster: Cluster) -> None:
    step = predict(machine, work, cluster, Choice("all_reduce"), PLAIN)
    # 100 samples of 0.1 ms and 1 ms; the optimizer on a million elements; 6 MB at 10 MB/s and 3 MB of sums; four
    # messages for the gradient and two for the totals.
    assert step.compute_seconds == pytest.approx(0.011 + 0.001)
    assert step.exchange_seconds == pytest.approx(0.6003)
    assert step.waiting_seconds == pytest.approx(6 * 1.1e-4)
    assert step.step_seconds == pytest.approx(0.012 + 0.6003 + 0.00066)
    assert step.sent_bytes == pytest.approx(6e6)
    # Program, gradient, buffers of 100 samples; weights, two moments and the slice that is exchanged.
    assert step.memory_bytes == pytest.approx(50e6 + 4e6 + 1e5 + 4 * 4e6)


def test_a_parameter_server_step_by_hand(machine: Machine, work: Workload, cluster: Cluster) -> None:
    step = predict(machine, work, cluster, Choice("parameter_server"), PLAIN)
    # Three remote pushes of 4 MB in by one link at 10 MB/s; the last of four chunks' answers leave when all is in.
    assert step.compute_seconds == pytest.approx(0.011)
    assert step.exchange_seconds + step.waiting_seconds == pytest.approx(1.2 * 5 / 4 + 3e-4 + 2e-4)
    assert step.exchange_seconds == pytest.approx(0.4 * 5 / 4)
    assert step.sent_bytes == pytest.approx(12e6)
    shared = predict(machine, work, cluster._replace(shared_link=True), Choice("parameter_server"), PLAIN)
    assert shared.exchange_seconds + shared.waiting_seconds == pytest.approx(2.4 + 3e-4 + 2e-4)


def test_a_parameter_server_may_answer_in_another_format(machine: Machine, work: Workload, cluster: Cluster) -> None:
    back = HALF._replace(bytes_per_element=1.0)
    wire = HALF._replace(encode_each=2e-9, decode_each=1e-9, answer=back)
    step = predict(machine, work, cluster, Choice("parameter_server", wire), PLAIN)
    # Three remote pushes of 2 MB in, and a quarter of their answers of 1 MB behind them; a worker encodes and decodes,
    # the server decodes four and encodes one.
    coding = 0.002 + 0.0005 + 4 * 0.001 + 0.001
    assert step.exchange_seconds + step.waiting_seconds == pytest.approx(0.6 + 0.3 / 4 + coding + 3e-4 + 2e-4)
    assert step.sent_bytes == pytest.approx(3e6)
    # Program, gradient, buffers of 100 samples; weights and what is yet to be sent.
    assert step.memory_bytes == pytest.approx(50e6 + 4e6 + 1e5 + 2 * 4e6)


def test_shards_help_the_link_only_where_they_are_on_several_nodes(
    machine: Machine, work: Workload, cluster: Cluster
) -> None:
    def seconds(servers: int, spread: bool) -> float:
        choice = Choice("parameter_server", servers=servers)
        return predict(machine, work, cluster, choice, Practice(servers_spread=spread)).step_seconds

    assert seconds(4, spread=False) == pytest.approx(seconds(1, spread=False))
    # Each way a quarter of three pushes and of three answers: both directions are busy all the time.
    assert seconds(4, spread=True) == pytest.approx(0.011 + 0.4 * 1.5 + 5e-4)
    # On two of the nodes: half of three pushes come in, then half of three answers leave; of two chunks the second
    # pushes pass the first answers.
    assert seconds(2, spread=True) == pytest.approx(0.011 + 0.4 * (2 + 1 / 2) + 5e-4)


def test_a_node_that_pushes_once_sends_less(machine: Machine, work: Workload, cluster: Cluster) -> None:
    wide = cluster._replace(ranks_per_node=2)
    every = predict(machine, work, wide, Choice("parameter_server"), PLAIN)
    once = predict(machine, work, wide, Choice("parameter_server"), Practice(node_pushes_once=True))
    assert once.sent_bytes == every.sent_bytes / 2
    assert once.step_seconds < 0.6 * every.step_seconds


def test_local_steps_exchange_once_in_so_many(machine: Machine, work: Workload, cluster: Cluster) -> None:
    every = predict(machine, work, cluster, Choice("local", steps=1), PLAIN)
    seldom = predict(machine, work, cluster, Choice("local", steps=10), PLAIN)
    assert seldom.exchange_seconds == pytest.approx(every.exchange_seconds / 10)
    assert seldom.sent_bytes == pytest.approx(every.sent_bytes / 10)
    assert seldom.compute_seconds == pytest.approx(0.012 + 0.0001)


def test_local_steps_meet_at_the_end_of_each_epoch_too(machine: Machine, work: Workload, cluster: Cluster) -> None:
    """Two steps an epoch: 500 of them are never made apart. Of 23, 16 make two meetings."""
    plain = predict(machine, work, cluster, Choice("local", steps=1), PLAIN).sent_bytes
    for epoch_steps, steps, meetings in ((2, 500, 1), (23, 16, 2), (23, 4, 6)):
        short = dataclasses.replace(work, epoch_steps=epoch_steps)
        step = predict(machine, short, cluster, Choice("local", steps=steps), PLAIN)
        assert step.sent_bytes == pytest.approx(plain * meetings / epoch_steps)


def test_half_the_bytes_take_half_the_time_and_their_coding(machine: Machine, work: Workload, cluster: Cluster) -> None:
    exact = predict(machine, work, cluster, Choice("all_reduce"), PLAIN)
    coded = predict(machine, work, cluster, Choice("all_reduce", HALF), PLAIN)
    assert coded.sent_bytes == exact.sent_bytes / 2
    # Encoded once, decoded for 2 x 3/4 of the vector; the sums are those of the plain all-reduce.
    assert coded.exchange_seconds == pytest.approx(0.3 + 0.001 + 0.00075 + 0.0003)


def test_a_format_whose_sums_do_not_code_goes_whole_to_every_node(
    machine: Machine, work: Workload, cluster: Cluster
) -> None:
    signs = WireFormat("sign", 0.125, 1e-9, 5e-10, sums_well=False)
    step = predict(machine, work, cluster, Choice("all_reduce", signs), PLAIN)
    assert step.sent_bytes == 3 * 125_000
    assert step.exchange_seconds == pytest.approx(0.0375 + 0.001 + 0.0015 + 3 * 4e6 * 1e-10)


def test_factors_are_two_all_reduces_and_their_coding(machine: Machine, work: Workload, cluster: Cluster) -> None:
    wire = FACTORED._replace(factors=(0.015, 0.005))
    step = predict(machine, work, cluster, Choice("all_reduce", wire), Practice())
    # 60 and 20 kB, 3/2 of each by the link and 3/4 summed; four messages for each and two for the totals.
    assert step.sent_bytes == pytest.approx(120e3)
    assert step.exchange_seconds == pytest.approx(0.012 + 0.75 * 80e3 * 1e-10 + 0.003)
    assert step.waiting_seconds == pytest.approx(10 * 1.1e-4)
    assert predict(machine, work, cluster._replace(nodes=1), Choice("all_reduce", wire), PLAIN).exchange_seconds == 0


def test_buckets_hide_behind_backward_but_for_the_first_layer(
    machine: Machine, work: Workload, cluster: Cluster
) -> None:
    # A quarter of the vector is finished at a quarter of 5.5 ms and travels in 1.5 ms: only the rest is waited for.
    fast = cluster._replace(bytes_per_second=1000e6 / PAYLOAD_SHARE, latency_seconds=0.0)
    after = predict(machine, work, fast, Choice("all_reduce"), PLAIN)
    during = predict(machine, work, fast, Choice("all_reduce"), Practice())
    assert during.sent_bytes == pytest.approx(after.sent_bytes)
    assert during.exchange_seconds == pytest.approx(0.75 * after.exchange_seconds)
    # Only the last piece of a share finishes anything: nothing is ready sooner.
    pieces = dataclasses.replace(work, micro_batch=10)
    slow = predict(machine, pieces, cluster, Choice("all_reduce"), Practice())
    assert slow.exchange_seconds == pytest.approx(0.6003 - 0.75 * 0.02 * 0.5 / 10, rel=1e-3)


def test_pieces_of_a_share_each_pay_the_fixed_part(machine: Machine, work: Workload, cluster: Cluster) -> None:
    pieces = dataclasses.replace(work, micro_batch=30)
    step = predict(machine, pieces, cluster, Choice("all_reduce"), PLAIN)
    assert step.compute_seconds == pytest.approx(4 * 0.001 + 0.010 + 0.001)


def test_ranks_beyond_the_cores_take_turns(machine: Machine, work: Workload, cluster: Cluster) -> None:
    work = dataclasses.replace(work, epoch_steps=10**9)
    two = predict(machine, work, cluster._replace(ranks_per_node=2), Choice("local", steps=10**9), PLAIN)
    four = predict(machine, work, cluster._replace(ranks_per_node=4), Choice("local", steps=10**9), PLAIN)
    assert two.compute_seconds == pytest.approx(0.001 + 0.005 + 0.0005)
    assert four.compute_seconds == pytest.approx(2 * (0.001 + 0.0025) + 0.00025)


def test_one_node_of_one_rank_exchanges_nothing(machine: Machine, work: Workload, cluster: Cluster) -> None:
    step = one_node(machine, work, cluster)
    assert (step.exchange_seconds, step.waiting_seconds, step.sent_bytes) == (0, 0, 0)
    assert step.step_seconds == pytest.approx(0.041 + 0.001)


machines = st.builds(
    Machine,
    cores=st.integers(1, 64),
    threads=st.just(1),
    compute=st.builds(Line, st.floats(1e-6, 1), st.floats(1e-9, 1e-2)),
    backward_share=st.floats(0.1, 0.9),
    ready=st.just((Ready(300, 0.25), Ready(700, 1.0))),
    update_each=st.floats(1e-12, 1e-7),
    sum_each=st.floats(1e-12, 1e-8),
    fence_seconds=st.floats(0, 1e-3),
    mpi=st.builds(Line, st.floats(0, 1e-3), st.floats(1e-12, 1e-8)),
    grpc=st.builds(Line, st.floats(0, 1e-3), st.floats(1e-12, 1e-8)),
    base_memory_bytes=st.integers(0, 10**9),
)
works = st.builds(
    Workload,
    st.integers(1, 10**7),
    st.integers(1, 10**4),
    st.integers(0, 100),
    st.integers(0, 3),
    st.integers(0, 10**5),
)
clusters = st.builds(
    Cluster, st.integers(1, 100), st.integers(1, 8), st.floats(1e4, 1e10), st.floats(0, 1e-2), st.booleans()
)
practices = st.builds(Practice, st.booleans(), st.booleans(), st.booleans())
choices = st.sampled_from(CHOICES)


@given(machines, works, clusters, choices, practices)
def test_nothing_is_below_0_and_a_faster_link_never_slows_a_step(machine, work, cluster, choice, practice) -> None:
    step = predict(machine, work, cluster, choice, practice)
    assert min(step[1:]) >= 0
    faster = predict(machine, work, cluster._replace(bytes_per_second=3 * cluster.bytes_per_second), choice, practice)
    nearer = predict(machine, work, cluster._replace(latency_seconds=0.0), choice, practice)
    assert faster.step_seconds <= step.step_seconds * (1 + 1e-9)
    assert nearer.step_seconds <= step.step_seconds * (1 + 1e-9)


@given(machines, works, clusters, choices)
def test_without_a_network_between_only_the_machine_is_left(machine, work, cluster, choice) -> None:
    """Bandwidth without end, and processes that pass bytes on for nothing: compute, sums and coding remain."""
    free = dataclasses.replace(machine, mpi=Line(0, 0), grpc=Line(0, 0), sum_each=0.0, fence_seconds=0.0)
    coded = (2 * choice.wire.encode_each + (cluster.ranks + 1) * choice.wire.decode_each) * work.parameters
    limit = predict(free, work, cluster._replace(bytes_per_second=1e30, latency_seconds=0.0), choice, PLAIN)
    assert limit.step_seconds <= (limit.compute_seconds + coded) * (1 + 1e-9) + 1e-12


@given(machines, works, clusters, choices, practices)
def test_each_further_node_adds_exchange_and_never_compute(machine, work, cluster, choice, practice) -> None:
    """Doubled, since numbers that are no powers of two pay for it; and beyond where Open MPI changes the algorithm.

    Overlap is left aside, which shorter backward passes hide less.
    """
    practice = practice._replace(buckets=False)
    work = dataclasses.replace(work, parameters=max(work.parameters, 10_000 * cluster.ranks_per_node))
    power = cluster._replace(nodes=1 << (cluster.nodes.bit_length() - 1))
    few, many = (
        predict(machine, work, power._replace(nodes=power.nodes * times), choice, practice) for times in (1, 2)
    )
    assert many.compute_seconds <= few.compute_seconds * (1 + 1e-9)
    if practice.servers_spread and choice.servers > 1:
        return  # a second node takes a shard off the first one's link
    between_few, between_many = (step.exchange_seconds + step.waiting_seconds for step in (few, many))
    assert between_many >= between_few * (1 - 1e-9)


@given(machines, works, clusters)
def test_overlap_hides_transfer_and_pays_for_it_in_latency_alone(machine, work, cluster) -> None:
    parameters = max(20_000 * cluster.ranks_per_node, work.parameters)  # where both ways are Rabenseifner's
    first = parameters // 4
    machine = dataclasses.replace(machine, ready=(Ready(parameters - first, 0.25), Ready(first, 1.0)))
    work = dataclasses.replace(work, parameters=parameters)
    after = predict(machine, work, cluster, Choice("all_reduce"), PLAIN)
    during = predict(machine, work, cluster, Choice("all_reduce"), Practice())
    assert during.exchange_seconds <= after.exchange_seconds * (1 + 1e-9)
    assert during.waiting_seconds == pytest.approx(after.waiting_seconds, rel=1e-6)
    assert during.sent_bytes == pytest.approx(after.sent_bytes)
