"""Where rank 0's measurements go: metrics.jsonl, plain lines for people, and the coordinator if there is one.

Rules: a report is a plain dict with the contract's names; it is written and flushed before anyone is told of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Report = dict[str, Any]
PLAIN_LINE_SECONDS = 5.0  # between two lines within an epoch; each epoch ends with one


class Reporter:
    """Writes each report to every sink.

    Args:
        metrics_path: appended to, one JSON object a line.
        epochs: where `epoch` will end, for the plain lines.
        print_line: takes one line for people.
        send: hands reports on to the coordinator, or None.
    """

    def __init__(
        self,
        metrics_path: Path,
        epochs: int,
        print_line: Callable[[str], None],
        send: Callable[[Report | None, list[dict[str, Any]]], None] | None = None,
    ) -> None:
        self._file: TextIO = metrics_path.open("a", encoding="utf-8")
        self._epochs = epochs
        self._print_line = print_line
        self._send = send
        self._saved: dict[str, float] = {}  # when the last checkpoint was complete, as in RankReport
        self._printed_at_seconds = -PLAIN_LINE_SECONDS

    def report(self, report: Report, ranks: list[dict[str, Any]], ends_epoch: bool) -> None:
        """Write one report. `ranks` holds every rank's exchange statistics and goes to the coordinator alone."""
        present = {name: value for name, value in report.items() if value is not None}
        self._file.write(json.dumps(present) + "\n")
        self._file.flush()
        if self._send is not None:
            self._send(present, [ranks[0] | self._saved, *ranks[1:]])
        now = report["wall_seconds"]
        if ends_epoch or now - self._printed_at_seconds >= PLAIN_LINE_SECONDS:
            self._printed_at_seconds = now
            self._print_line(plain_line(present, self._epochs))

    def first_step(self, rank_0: dict[str, Any]) -> None:
        """Training is under way: word to the coordinator, which need not wait for the first report."""
        if self._send is not None:
            self._send(None, [rank_0 | self._saved])

    def saved(self, time: float, rank_0: dict[str, Any]) -> None:
        """A checkpoint was complete at `time`, in seconds since the Unix epoch; from any thread.

        `rank_0`: its statistics now, which may tell of more than the last report's: parameter servers can die behind
        the last step.
        """
        self._saved = {"checkpoint_time": time}
        if self._send is not None:
            self._send(None, [rank_0 | self._saved])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain_line(report: Report, epochs: int) -> str:
    """One report in words, such as `epoch 1/3  step 235/705  loss 0.5123  accuracy 0.812  51,234 samples/s`."""
    parts = [f"epoch {report['epoch']}/{epochs}", f"step {report['step']}/{report['total_steps']}"]
    if "loss" in report:
        parts.append(f"loss {report['loss']:.4f}")
    if "accuracy" in report:
        parts.append(f"accuracy {report['accuracy']:.4f}")
    parts.append(f"{report['samples_per_second']:,.0f} samples/s")
    if "validation_loss" in report:
        parts.append(f"validation loss {report['validation_loss']:.4f}")
    if "validation_accuracy" in report:
        parts.append(f"validation accuracy {report['validation_accuracy']:.4f}")
    values = report.get("validation_metrics", {}).items()
    parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in values if isinstance(value, float)]
    return "  ".join(parts)
