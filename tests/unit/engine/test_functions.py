"""The functions that layers and losses share."""

import math

import numpy as np

from worker.engine.functions import normal_tail


def tail(a: np.ndarray) -> np.ndarray:
    bell, scratch, out = np.empty_like(a), np.empty_like(a), np.empty_like(a)
    normal_tail(a, bell, scratch=scratch, out=out)
    np.testing.assert_allclose(bell, np.exp(-(a.astype(np.float64) ** 2) / 2), rtol=1e-5)
    return out


def test_the_normal_tail_in_float32_errs_by_no_more_than_it_says() -> None:
    a = np.linspace(0, 12, 20_001, dtype=np.float32)
    exact = np.array([math.erfc(value / math.sqrt(2)) / 2 for value in a.tolist()])
    error = np.abs(tail(a) - exact)
    assert error.max() <= 2.2e-7
    assert (error / exact)[a <= 5].max() <= 1e-6
    assert (error / exact).max() <= 5e-6


def test_the_normal_tail_in_float64_is_the_error_function() -> None:
    a = np.linspace(0, 12, 301).reshape(7, 43)
    np.testing.assert_array_equal(tail(a), np.reshape([math.erfc(v / math.sqrt(2)) / 2 for v in a.flat], a.shape))


def test_the_normal_tail_of_anything_large_is_zero() -> None:
    with np.errstate(over="ignore"):
        assert tail(np.array([40.0, 1e30], np.float32)).tolist() == [0, 0]
