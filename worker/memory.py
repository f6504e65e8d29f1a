"""How much memory this process has held at once.

Rules: what counts is what the machine must have free for it: its own pages, those it shares with the other ranks, and
its libraries. Pages of a data file that is memory-mapped do not count: the system keeps them while nothing else needs
the room, so that a file larger than memory would seem to fit nowhere.
"""

from pathlib import Path

KILOBYTE = 1024


class MemoryPeak:
    """Looks now and then. Made once the libraries are loaded and before any data is opened."""

    def __init__(self) -> None:
        self._libraries = _status("RssFile")
        self._highest = 0

    def look(self) -> None:
        """See what is held now."""
        self._highest = max(self._highest, _status("RssAnon") + _status("RssShmem"))

    def bytes(self, maps_data: bool) -> int:
        """The most so far: where no data is mapped what the system kept account of, else the most that was seen.

        The former is Linux's VmHWM: getrusage's ru_maxrss keeps what the parent process held when it started this one.
        """
        if not maps_data:
            return _status("VmHWM")
        self.look()
        return self._highest + self._libraries


def _status(name: str) -> int:
    """One entry of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * KILOBYTE
