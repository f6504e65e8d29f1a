"""The bell that wakes watchers."""

import threading
import time

from coordinator.changes import Changes


def test_a_change_between_looking_and_waiting_is_not_missed() -> None:
    changes = Changes()
    seen = changes.count
    changes.ring()
    assert changes.wait(seen, timeout_seconds=60) == seen + 1


def test_every_waiter_wakes_at_one_ring() -> None:
    changes, woken = Changes(), []
    waiters = [threading.Thread(target=lambda: woken.append(changes.wait(0, 60))) for _ in range(5)]
    for waiter in waiters:
        waiter.start()
    changes.ring()
    for waiter in waiters:
        waiter.join(10)
    assert woken == [1] * 5


def test_closing_wakes_those_who_wait_and_nobody_waits_again() -> None:
    changes = Changes()
    waiter = threading.Thread(target=changes.wait, args=(0, 60))
    waiter.start()
    changes.close()
    waiter.join(10)
    assert not waiter.is_alive()
    assert changes.closed
    assert changes.wait(0, 60) == 0


def test_waiting_ends_with_its_time() -> None:
    before = time.monotonic()
    assert Changes().wait(0, 0.01) == 0
    assert time.monotonic() - before < 10
