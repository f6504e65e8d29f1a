"""Whatever happens to the bytes of a data file, reading it ends in an array or in one DataFault."""

import contextlib
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.whole_files import WHOLE
from worker.data.sources import open_features
from worker.errors import DataFault


@pytest.mark.parametrize("name", WHOLE)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_a_changed_cut_or_extended_file_is_read_or_is_one_fault(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    content += data.draw(st.binary(max_size=3))
    path = tmp_path / name
    path.write_bytes(content)
    with warnings.catch_warnings(), contextlib.suppress(DataFault):
        warnings.simplefilter("ignore")  # NumPy warns of headers that Python 2 wrote
        assert open_features(str(path)).size > 0
