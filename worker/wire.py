"""Arrays to gRPC messages and back, a chunk at a time.

A chunk on the wire is an ordinary protobuf message that any client can read or write, but the array's bytes do not
pass through the protobuf library: it would copy them three times each way. They are joined behind the serialized head
with one copy, and read where they lie with none.

Rules: the array is the message's last field, and little-endian float32 or bytes. Nothing here knows what a message
means.
"""

import ctypes
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

FLOAT32 = np.dtype("<f4")
# 1 MiB: large enough that a message's fixed cost vanishes, small enough that push, update and pull overlap.
CHUNK_ELEMENTS = 1 << 18

_LENGTH_DELIMITED = 2
_PADDING_FIELD = 14
_ALIGNMENT = 4  # NumPy reads an array that is not aligned to its elements at a third of the speed
# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

M = TypeVar("M", bound=Message)


def even_chunk_elements(count: int) -> int:
    """The size of equal chunks, near CHUNK_ELEMENTS, that `count` elements divide into.

    Equal, because a short chunk costs a message as a full one does: of 535,818 elements, two chunks of 1.07 MB take
    less time than two of 1 MB and a rest.
    """
    return -(-count // max(1, round(count / CHUNK_ELEMENTS)))


def chunk_bounds(start: int, stop: int, chunk_elements: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of each chunk of the elements start to stop - 1; the last may be shorter."""
    for first in range(start, stop, chunk_elements):
        yield first, min(first + chunk_elements, stop)


def encode(head: Message, field: int, array: Float32 | NDArray[np.uint8]) -> bytes:
    """Serialize `head` with `array` (1-D, contiguous, of numbers or of bytes) as its bytes field number `field`."""
    packed = head.SerializeToString()
    prefix = _key(field) + _varint(array.nbytes)
    gap = -(len(packed) + len(prefix)) % _ALIGNMENT
    if gap:
        # A padding field takes two bytes at least, for its key and its length.
        spare = gap - 2 if gap >= 2 else gap + _ALIGNMENT - 2
        packed += _key(_PADDING_FIELD) + _varint(spare) + bytes(spare)
    payload = array if array.dtype == np.uint8 else array.astype(FLOAT32, copy=False)
    return b"".join((packed, prefix, payload.data))


def decode(kind: type[M], field: int, data: bytes) -> tuple[M, memoryview]:
    """Split a serialized `kind` into its head and the bytes of field number `field`, which stay where they are.

    Raises DecodeError where `data` is not such a message.
    """
    wanted = field << 3 | _LENGTH_DELIMITED
    position = 0
    while position < len(data):
        first = position
        key, position = _read_varint(data, position)
        match key & 7:
            case 0:
                _, position = _read_varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _read_varint(data, position)
                if key == wanted:
                    if position + length > len(data):
                        raise DecodeError(f"field {field} says {length} bytes, {len(data) - position} follow")
                    head = kind.FromString(data[:first] + data[position + length :])
                    return head, memoryview(data)[position : position + length]
                position += length
            case 5:
                position += 4
            case kind_of_field:
                raise DecodeError(f"byte {first} begins a field of unknown wire type {kind_of_field}")
    return kind.FromString(data), memoryview(b"")


def as_array(payload: memoryview) -> Float32:
    """The payload as float32 elements, not copied and read-only. Raises ValueError on a broken last element."""
    return np.frombuffer(payload, dtype=FLOAT32)


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what messages free instead of giving it back to the system at once.

    Each chunk is a fresh megabyte; given back and asked for again, it costs 256 page faults, which were 12 of the
    36 ms of processor time that a server spent on a round trip of 23 MB. At most 64 MB are kept. Other C libraries
    have no such setting and are left alone.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, 32 << 20)
        set_option(_M_TRIM_THRESHOLD, 64 << 20)


def _key(field: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise DecodeError(f"byte {position}: the message ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
