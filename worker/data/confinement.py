"""Where a coordinator lets its workers read: below its data roots, judged again when a file is opened.

Rules: links can change between the taking of a job and its start, so what counts is the file that was opened, and that
very file is read. The package's own data and files fetched into the cache are no places a job file names. Without data
roots, as without a coordinator, a path is just that.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from protos.environment import DATA_ROOTS
from protos.urls import is_under, is_url, shown
from worker.errors import DataFault

PACKAGE_DATA = Path(__file__).parent / "built_in"


@contextmanager
def confined(path: str, own: Sequence[Path] = ()) -> Iterator[str]:
    """A path to the file that `path` leads to now, whatever becomes of links, until the block ends.

    own: folders besides PACKAGE_DATA that hold no path of a job file. OSError where it cannot be opened; DataFault
    where the coordinator does not let jobs read it.
    """
    roots = data_roots()
    if not roots or any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in (PACKAGE_DATA, *own)):
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us up
    try:
        held = f"/proc/self/fd/{descriptor}"
        real = Path(os.readlink(held))
        if not any(real.is_relative_to(root) for root in roots if not is_url(root)):
            raise _outside(path, roots)
        yield held
    finally:
        os.close(descriptor)


def check_url(url: str) -> None:
    """DataFault where the coordinator does not let jobs read it."""
    roots = data_roots()
    if roots and not any(is_under(url, root) for root in roots if is_url(root)):
        raise _outside(shown(url), roots)


def data_roots() -> list[str]:
    """Resolved folders and URLs; none means anywhere."""
    return list(json.loads(os.environ.get(DATA_ROOTS) or "[]"))


def _outside(place: str, roots: Sequence[str]) -> DataFault:
    return DataFault(
        f"{place}: leads out of where this coordinator lets jobs read: {', '.join(roots)}; "
        "name a file below it (--data-root of paceline serve)"
    )
