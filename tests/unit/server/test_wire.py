"""Chunks on the wire are ordinary protobuf messages, and damage is noticed."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos import parameter_server_pb2 as pb
from worker.wire import CHUNK_ELEMENTS, as_array, chunk_bounds, decode, encode, even_chunk_elements

GRADIENT = pb.ExchangeRequest.GRADIENT_FIELD_NUMBER

heads = st.builds(
    pb.ExchangeRequest,
    worker=st.integers(0, 2**31 - 1),
    generation=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**63 - 1),
    samples=st.integers(0, 2**40),
    learning_rate=st.floats(0, 1),
    totals=st.lists(st.floats(-1e300, 1e300), max_size=4),
)


@given(heads, st.integers(0, 300))
def test_a_chunk_is_read_alike_by_protobuf_and_by_us(head: pb.ExchangeRequest, count: int) -> None:
    array = np.arange(count, dtype=np.float32)
    data = encode(head, GRADIENT, array)
    whole = pb.ExchangeRequest.FromString(data)
    assert whole.gradient == array.tobytes()
    ours, payload = decode(pb.ExchangeRequest, GRADIENT, data)
    np.testing.assert_array_equal(as_array(payload), array)
    for message in (whole, ours):
        message.ClearField("gradient")
        message.ClearField("padding")
        assert message == head


@given(heads, st.integers(1, 50))
def test_an_array_lies_aligned_in_the_message(head: pb.ExchangeRequest, count: int) -> None:
    data = encode(head, GRADIENT, np.zeros(count, np.float32))
    assert as_array(decode(pb.ExchangeRequest, GRADIENT, data)[1]).flags.aligned


@given(heads, st.binary(max_size=50))
def test_what_protobuf_wrote_is_read(head: pb.ExchangeRequest, gradient: bytes) -> None:
    message = pb.ExchangeRequest(gradient=gradient)
    message.MergeFrom(head)
    ours, payload = decode(pb.ExchangeRequest, GRADIENT, message.SerializeToString())
    assert (ours, bytes(payload)) == (head, gradient)


@given(heads, st.data())
def test_a_message_cut_short_is_refused_or_lacks_whole_fields(head: pb.ExchangeRequest, data: st.DataObject) -> None:
    packed = encode(head, GRADIENT, np.ones(9, np.float32))
    cut = data.draw(st.integers(0, len(packed) - 1))
    try:
        _, payload = decode(pb.ExchangeRequest, GRADIENT, packed[:cut])
    except DecodeError:
        return
    assert len(payload) == 0


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        decode(pb.ExchangeRequest, GRADIENT, data)
    except DecodeError:
        return


def test_an_unknown_wire_type_is_refused() -> None:
    with pytest.raises(DecodeError, match="byte 0 begins a field of unknown wire type 7"):
        decode(pb.ExchangeRequest, GRADIENT, b"\x0f")


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 300))
def test_chunks_cover_every_element_once(start: int, count: int, chunk_elements: int) -> None:
    bounds = list(chunk_bounds(start, start + count, chunk_elements))
    assert [first for first, _ in bounds] == list(range(start, start + count, chunk_elements))
    assert [stop for _, stop in bounds] == [*(first for first, _ in bounds[1:]), start + count]


@given(st.integers(1, 10**8))
def test_equal_chunks_are_of_one_size_near_a_megabyte(count: int) -> None:
    elements = even_chunk_elements(count)
    rest = count % elements
    pieces = -(-count // elements)
    assert rest == 0 or elements - rest < pieces
    assert elements <= 1.5 * CHUNK_ELEMENTS + 1
    assert elements >= min(count, 2 * CHUNK_ELEMENTS // 3)
