"""The bells that wake watchers."""

import threading
import time

from coordinator.changes import Changes


def test_a_change_between_looking_and_waiting_is_not_missed() -> None:
    changes = Changes()
    with changes.watching("job") as bell:
        seen = bell.count
        changes.ring("job")
        assert bell.wait(seen, timeout_seconds=60) == seen + 1


def test_every_waiter_of_a_job_wakes_at_one_ring_and_no_others() -> None:
    changes, woken = Changes(), []

    def wait() -> None:
        with changes.watching("job") as bell:
            woken.append(bell.wait(0, 60))

    with changes.watching("job") as kept, changes.watching("other") as other:
        waiters = [threading.Thread(target=wait) for _ in range(5)]
        for waiter in waiters:
            waiter.start()
        changes.ring("job", "not watched")
        for waiter in waiters:
            waiter.join(60)
        assert (kept.count, other.count) == (1, 0)
    assert woken == [1] * 5


def test_a_job_that_nobody_watches_any_more_is_forgotten() -> None:
    changes = Changes()
    with changes.watching("job") as bell:
        bell.ring()
        assert bell.count == 1
    with changes.watching("job") as bell:
        assert bell.count == 0


def test_closing_wakes_those_who_wait_and_nobody_waits_again() -> None:
    changes = Changes()
    with changes.watching("job") as bell:
        waiter = threading.Thread(target=bell.wait, args=(0, 60))
        waiter.start()
        changes.close()
        waiter.join(10)
        assert not waiter.is_alive()
        assert changes.closed
        assert bell.wait(0, 60) == 0
    with changes.watching("another") as bell:
        assert bell.wait(0, 60) == 0


def test_waiting_ends_with_its_time() -> None:
    before = time.monotonic()
    with Changes().watching("job") as bell:
        assert bell.wait(0, 0.01) == 0
    assert time.monotonic() - before < 10
