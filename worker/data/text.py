"""Text for language models: bytes are the tokens, and the targets of a window are the bytes that come next.

Rules: the file is memory-mapped and never copied, so it may be larger than memory. Windows are `context` bytes apart:
each byte but the first is a target once an epoch, and both arrays are plain views of the file, a byte apart. What is
left at the end and fills no window is not read.
"""

import numpy as np
from numpy.typing import NDArray

from worker.data.files import reachable, size_of
from worker.data.stored_array import StoredArray
from worker.errors import DataFault

LARGEST_BYTE = 255


def read_text(path: str, context: int) -> tuple[StoredArray, StoredArray]:
    """(features, targets), uint8 (n, context) each: targets[i, t] is the byte of the file behind features[i, t].

    n is (size - 1) // context; DataFault for a file that holds no window of context + 1 bytes.
    """
    file_bytes = size_of(path)
    windows = (file_bytes - 1) // context
    if windows == 0:
        remedy = (
            f"name a longer text or set context to {file_bytes - 1} at most" if file_bytes > 1 else "name a longer text"
        )
        raise DataFault(f"{path}: holds {file_bytes} bytes, too few for a sample of {context + 1}; {remedy}")
    text = _map(path, windows * context + 1)
    shape = (windows, context)
    features = text[: windows * context].reshape(shape)
    targets = text[1 : windows * context + 1].reshape(shape)
    return StoredArray(features, path), StoredArray(targets, path)


def read_windows(path: str, context: int) -> tuple[StoredArray, int]:
    """Features alone, uint8 (n, context), and how many bytes at the end fill no window: n is size // context.

    DataFault for a file that holds no window.
    """
    file_bytes = size_of(path)
    windows, rest = divmod(file_bytes, context)
    if windows == 0:
        raise DataFault(
            f"{path}: holds {file_bytes} bytes, and the model takes {context} at a time; name a longer text"
        )
    return StoredArray(_map(path, file_bytes)[: windows * context].reshape(windows, context), path), rest


def _map(path: str, needed_bytes: int) -> NDArray[np.uint8]:
    """The file's bytes, memory-mapped: at least as many as it was just said to have."""
    try:
        with reachable(path) as here:
            mapped = np.memmap(here, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # a limit on mappings, no permission, or a file that shrank meanwhile
        raise DataFault(f"{path}: cannot be memory-mapped: {error}; check the file and its permissions") from error
    text = np.asarray(mapped)  # a plain array over the map: indexing np.memmap itself is slower
    if len(text) < needed_bytes:
        raise DataFault(f"{path}: shrank while it was opened; open it when it is no longer written")
    return text
