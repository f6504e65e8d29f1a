"""Data files as they should be, one of each kind: what is damaged, or made up from, by those who try the readers."""

import gzip
import io
from collections.abc import Callable

import numpy as np

VALUES = np.arange(20, dtype=np.float32).reshape(4, 5)


def saved(save: Callable[..., object], *args: object, **arrays: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **arrays)
    return buffer.getvalue()


IDX = b"\0\0\x0d\x02\0\0\0\4\0\0\0\5" + VALUES.astype(">f4").tobytes()
WHOLE = {
    "a.npy": saved(np.save, VALUES),
    "a.npz": saved(np.savez, x=VALUES),
    "b.npz": saved(np.savez_compressed, x=VALUES),
    "a.idx": IDX,
    "a.gz": gzip.compress(IDX),
    "a.csv": b"a,b\n1,2\n3.5,4e3\n",
}
