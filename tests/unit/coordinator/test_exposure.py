"""Where a coordinator may listen with what."""

import pytest

from coordinator.addresses import Address
from coordinator.exposure import exposure_fault, exposure_warning

HERE, OUT = Address("127.0.0.1", 1), Address("0.0.0.0", 1)


@pytest.mark.parametrize(
    ("listen", "http", "tls", "insecure", "refused", "warned"),
    [
        (HERE, HERE, False, False, None, None),
        (HERE, HERE, True, False, None, None),
        (HERE, HERE, False, True, None, None),
        (OUT, HERE, False, False, "--listen", None),
        (HERE, OUT, False, False, "--http", None),
        (Address("coordinator.example.org", 1), HERE, False, False, "--listen", None),
        (OUT, OUT, True, False, None, None),
        (OUT, OUT, True, True, None, None),
        (OUT, HERE, False, True, None, "--listen"),
        (HERE, OUT, False, True, None, "--http"),
    ],
)
def test_others_reach_it_with_tls_or_by_an_insecure_that_says_what_it_means(
    listen, http, tls, insecure, refused, warned
) -> None:
    reached = [("--listen L", listen), ("--http H", http)]
    fault = exposure_fault(reached, tls, insecure)
    assert (fault is None) == (refused is None)
    if fault is not None:
        assert fault.startswith(refused)
        assert "--tls-certificate" in fault
        assert "--insecure" in fault
        assert len(fault.splitlines()) == 1
        return
    warning = exposure_warning(reached, tls)
    assert (warning is None) == (warned is None)
    assert warning is None or (warning.startswith(warned) and "whoever reaches it can run" in warning)
