"""A rank that makes no progress is ended and says what it was doing."""

import queue
import threading

from worker.watchdog import Watchdog


def test_an_activity_that_takes_too_long_is_named() -> None:
    stalled = threading.Event()
    sentences: list[str] = []

    def on_stall(sentence: str) -> None:
        sentences.append(sentence)
        stalled.set()

    watchdog = Watchdog(0.1, on_stall)
    watchdog.doing("in step 7 (epoch 1)")
    assert stalled.wait(timeout=10)
    watchdog.stop()
    assert "in step 7 (epoch 1)" in sentences[0]
    assert "; another rank is stuck or gone, or limits.stall_seconds (0.1) is too short for this job" in sentences[0]


def test_a_rank_alone_accuses_no_other() -> None:
    sentences: queue.Queue[str] = queue.Queue()
    watchdog = Watchdog(0.1, sentences.put, is_alone=True)
    said = sentences.get(timeout=10)
    watchdog.stop()
    assert said.endswith(" while starting; limits.stall_seconds (0.1) is too short for this job")


def test_a_rank_shows_that_it_lives_for_as_long_as_it_is_watched() -> None:
    looked = threading.Event()
    watchdog = Watchdog(0.1, lambda sentence: None, looked.set)
    assert looked.wait(timeout=10)
    watchdog.stop()


def test_a_watchdog_that_was_stopped_says_nothing() -> None:
    sentences: list[str] = []
    watchdog = Watchdog(0.2, sentences.append)
    watchdog.stop()
    assert not threading.Event().wait(0.4)
    assert sentences == []


def test_an_activity_may_take_longer_than_the_limit_where_that_is_said_and_the_next_may_not() -> None:
    stalled = threading.Event()
    watchdog = Watchdog(0.1, lambda sentence: stalled.set())
    watchdog.doing("starting a server", least_seconds=60)
    assert not stalled.wait(timeout=0.5)
    watchdog.doing("in step 1 (epoch 1)")
    assert stalled.wait(timeout=10)
    watchdog.stop()
