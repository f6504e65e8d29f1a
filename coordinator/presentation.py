"""Jobs and reports as people and programs read them: text, JSON, CSV.

Rules: pure functions from messages to text. JSON has the proto's snake_case names, whole numbers as numbers, states
without their prefix, times in ISO 8601, and leaves out what is absent or not finite (JSON has no NaN). Text from
elsewhere never carries control characters to a terminal.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from protos import job_pb2
from protos.job_file import to_dict as job_document

PHASES = ("data", "forward", "backward", "exchange", "update")
REPORT_COLUMNS = (
    "step",
    "epoch",
    "samples",
    "loss",
    "accuracy",
    "validation_loss",
    "validation_accuracy",
    "learning_rate",
    "samples_per_second",
    "wall_seconds",
)
TEXT_COLUMNS = {  # of `paceline metrics`: what fits a terminal
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "accuracy": "accuracy",
    "validation_loss": "val loss",
    "validation_accuracy": "val accuracy",
    "samples_per_second": "samples/s",
    "wall_seconds": "seconds",
}


# ---------------------------------------------------------------------------------------------------------------- JSON


def document(message: Message) -> dict[str, Any]:
    """A message as JSON says it."""
    if isinstance(message, job_pb2.JobSpec):
        return job_document(message)
    fields = {field.name: _value(field, getattr(message, field.name)) for field in _present(message)}
    return {name: value for name, value in fields.items() if value is not None}


def json_line(value: Message | dict[str, Any]) -> str:
    return json.dumps(document(value) if isinstance(value, Message) else value, allow_nan=False)


def _present(message: Message) -> list[Any]:
    """Fields that are set, and those that cannot say whether they are: a plain 0 is a 0."""
    return [field for field in message.DESCRIPTOR.fields if not field.has_presence or message.HasField(field.name)]


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: _finite(value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_single(field, element) for element in value]
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return time_text(value)
    if isinstance(value, Struct):
        return MessageToDict(value)
    if isinstance(value, Message):
        return document(value)
    if field.enum_type is not None:
        return state_name(value)
    return _finite(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------- text


def state_name(state: int) -> str:
    """`RUNNING` of JOB_STATE_RUNNING; the number of a state this version does not know."""
    known = job_pb2.JobState.DESCRIPTOR.values_by_number.get(state)
    return known.name.removeprefix("JOB_STATE_") if known is not None else str(state)


def time_text(time: Timestamp) -> str:
    return time.ToDatetime(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str) -> str:
    """Text without characters that would command a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)


def first_line(text: str) -> str:
    """What a message says in its first line; a failed job's goes on with the last lines of a log."""
    return printable(text.partition("\n")[0])


def number(value: float) -> str:
    """Four decimals where they say something."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10000 else f"{value:.3e}"


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `1 d 3 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for name, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {name}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError(f"{seconds} s has no name")  # the table ends at 60


def state_line(job: job_pb2.Job) -> str:
    """The state and why, such as `QUEUED (1st in the queue): needs 4 slots, 1 free`."""
    place = f" (number {job.queue_position} in the queue)" if job.queue_position else ""
    return f"{state_name(job.state)}{place}" + (f": {first_line(job.message)}" if job.message else "")


def job_table(jobs: Sequence[job_pb2.Job], now: datetime) -> str:
    """One line a job: id, state, name, workers, progress, age, and why it is as it is."""
    rows = [("ID", "STATE", "NAME", "WORKERS", "PROGRESS", "AGE", "WHY")]
    for job in jobs:
        age = max(0.0, (now - job.create_time.ToDatetime(UTC)).total_seconds())
        rows.append(
            (
                job.id,
                state_name(job.state),
                printable(job.spec.name),
                str(job.spec.workers),
                _progress_words(job),
                duration(age),
                first_line(job.message) or job.reason,
            )
        )
    return _aligned(rows)


def job_text(job: job_pb2.Job) -> str:
    """Everything about one job, a fact a line."""
    facts = [
        ("id", job.id),
        ("name", printable(job.spec.name)),
        ("state", state_line(job)),
        ("owner", printable(job.owner)),
        ("priority", str(job.spec.priority)),
        ("labels", ", ".join(f"{name}={job.spec.labels[name]}" for name in sorted(job.spec.labels))),
        ("workers", str(job.spec.workers)),
        ("progress", _progress_words(job)),
    ]
    if job.HasField("progress"):
        facts += [
            (name, number(value))
            for name in ("loss", "accuracy")
            if (value := _optional(job.progress, name)) is not None
        ]
    if job.HasField("summary"):
        facts += summary_facts(job.summary)
    lines = _aligned([(f"{name}:", value) for name, value in facts if value])
    history = _aligned(
        [
            ("  " + time_text(change.time), state_name(change.state), first_line(change.message))
            for change in job.history
        ]
    )
    rest = printable(job.message).partition("\n")[2]
    return "\n".join([lines, *(["history:", history] if history else []), *([rest] if rest else [])])


def summary_facts(summary: job_pb2.Summary) -> list[tuple[str, str]]:
    """What a finished run achieved, for people."""
    facts = [("training loss", number(summary.train_loss))]
    if summary.HasField("validation_loss"):
        facts.append(("validation loss", number(summary.validation_loss)))
    if summary.HasField("validation_accuracy"):
        facts.append(("validation accuracy", number(summary.validation_accuracy)))
    if summary.HasField("best_epoch"):
        facts.append(("kept", f"the weights of epoch {summary.best_epoch}, the best"))
    if summary.stopped_early:
        facts.append(("stopped early", "the validation loss did not improve any more"))
    if summary.HasField("initialized"):
        begun = summary.initialized
        left = f", {len(begun.unfitted)} things did not fit: see summary.json" if begun.unfitted else ""
        facts.append(("began with", f"{len(begun.fitted)} arrays of {printable(begun.file)}{left}"))
    many = "s" if summary.world_size != 1 else ""
    return [
        *facts,
        ("trained", f"{summary.epochs} epochs, {summary.steps:,} steps, {summary.samples:,} samples"),
        ("speed", f"{summary.samples_per_second:,.0f} samples/s on {summary.world_size} worker{many}"),
        (
            "time",
            f"{duration(summary.wall_seconds)} of training, first step after {duration(summary.seconds_to_first_step)}",
        ),
        ("size", f"{summary.parameters:,} parameters, {summary.peak_memory_bytes / 1e6:,.0f} MB a worker at most"),
    ]


def facts_text(facts: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    return _aligned([(f"{indent}{name}", value) for name, value in facts])


def _progress_words(job: job_pb2.Job) -> str:
    if not job.HasField("progress"):
        return "-"
    report = job.progress
    share = f" ({100 * report.step // report.total_steps}%)" if report.total_steps else ""
    return f"epoch {report.epoch}/{job.spec.training.epochs}{share}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to their widest entry; the last one is as long as it is, cut to the terminal by nobody."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


# -------------------------------------------------------------------------------------------------------------- reports


def report_table(reports: Sequence[job_pb2.Report]) -> str:
    """The reports of a job, right-aligned."""
    shown = [name for name in TEXT_COLUMNS if any(_optional(report, name) is not None for report in reports)]
    rows = [[TEXT_COLUMNS[name] for name in shown]]
    rows += [[_cell(name, _optional(report, name)) for name in shown] for report in reports]
    widths = [max(len(row[column]) for row in rows) for column in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def report_csv(reports: Sequence[job_pb2.Report]) -> str:
    """Every number of every report, with a line of names; an absent one is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*REPORT_COLUMNS, *(f"{phase}_seconds" for phase in PHASES)])
    for report in reports:
        phases = [report.phase_seconds.get(phase, "") for phase in PHASES]
        values = [_optional(report, name) for name in REPORT_COLUMNS]
        writer.writerow([*("" if value is None else value for value in values), *phases])
    return out.getvalue()


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "samples_per_second":
        return f"{value:,.0f}"
    if name == "wall_seconds":
        return f"{value:.1f}"
    return str(value) if isinstance(value, int) else number(value)


def _optional(report: job_pb2.Report, name: str) -> Any:
    field = report.DESCRIPTOR.fields_by_name[name]
    return None if field.has_presence and not report.HasField(name) else getattr(report, name)
