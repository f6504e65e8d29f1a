"""The folder a run leaves: which files it holds, when it may be written, and how a run is taken up again in it.

Rules: nothing is made before the job is known to fit together. A folder that holds a run, be it one checkpoint, is not
written to, unless it is to be resumed; then the job may differ only in what leaves the mathematics done so far alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos import job_pb2
from protos.job_file import JobFileInvalid, parse_job, to_dict, to_yaml
from worker import model_file
from worker.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint, remove_leftovers, write_atomically
from worker.errors import OutputFault
from worker.measurements import Position

JOB = "job.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
GUESTS = "guests.json"  # there while a job runs that takes guests

TRAINING_MAY_CHANGE = (
    *("epochs", "keep_checkpoints", "checkpoint_seconds", "checkpoint_steps"),
    *("micro_batch", "early_stopping"),
)
# A resumed job may name other values for these; everything else decides what the weights become.
MAY_CHANGE = {
    "name": None,
    "priority": None,
    "labels": None,
    "workers": None,
    "limits": None,
    "sync": None,
    "training": TRAINING_MAY_CHANGE,
}


def check_outside_run(folder: Path, path: Path, remedy: str) -> None:
    """OutputFault where `path` cannot be a new file, is a device, or is one that the run in `folder` left."""
    if os.path.isdir(path):  # not Path's, which raises where a name is too long to be one
        raise OutputFault(f"{path}: is a folder; {remedy}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputFault(f"{path}: is not a file that can be replaced; {remedy}")
    if not os.path.isdir(path.parent):
        raise OutputFault(f"{path.parent}: is not a folder; make it, or {remedy}")
    within, run = path.parent.resolve(), folder.resolve()
    kept = (model_file.FILE_NAME, JOB, METRICS, SUMMARY)
    if (within == run and path.name in kept) or within == run / CHECKPOINTS:
        raise OutputFault(f"{path}: belongs to the run; {remedy}")


def open_new(folder: Path, job: job_pb2.JobSpec) -> None:
    """Make the folder and write the resolved job into it.

    Raises:
        OutputFault: it already holds a run, or cannot be made.
    """
    held = [name for name in (model_file.FILE_NAME, SUMMARY) if (folder / name).exists()]
    held += [CHECKPOINTS] if has_checkpoint(folder) else []
    if held:
        raise OutputFault(
            f"{folder}: already holds a run ({', '.join(held)}); "
            "go on with it by --resume, or name another folder with -o"
        )
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (folder / METRICS).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        remove_leftovers(folder / CHECKPOINTS, newest=0)
    except OSError as error:
        raise OutputFault(f"{folder}: cannot be made: {error.strerror}; name another folder with -o") from error
    write_atomically(folder / JOB, to_yaml(job).encode())


def open_again(folder: Path, job: job_pb2.JobSpec, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint from which `job` goes on with the run in the folder; writes the job there.

    Raises:
        OutputFault: there is no run, or it was another job, or has done more epochs; names the first difference.
        CheckpointFault: none of its checkpoints can be read.
    """
    if not has_checkpoint(folder):
        raise OutputFault(f"{folder}: holds no checkpoint yet; leave --resume out to start anew")
    try:
        before = parse_job((folder / JOB).read_text())
    except FileNotFoundError as error:
        raise OutputFault(f"{folder}: holds no run to resume; leave --resume out to start one") from error
    except (JobFileInvalid, UnicodeDecodeError) as error:
        raise OutputFault(f"{folder / JOB}: is damaged and says no longer which job this was: {error}") from error
    difference = first_difference(_fixed_part(to_dict(before)), _fixed_part(to_dict(job)))
    if difference:
        raise OutputFault(f"{folder}: was another job: {difference}; resume with the same job or name another -o")
    found = newest_checkpoint(folder / CHECKPOINTS, say)
    if found.epoch + bool(found.batches) > job.training.epochs:
        more = " and a part of the next" if found.batches else ""
        raise OutputFault(
            f"{folder}: has done {found.epoch} epochs{more} and training.epochs is {job.training.epochs}; ask for more"
        )
    remove_leftovers(folder / CHECKPOINTS, found.step)
    write_atomically(folder / JOB, to_yaml(job).encode())
    return found


def has_checkpoint(folder: Path) -> bool:
    """Whether training got far enough to leave one."""
    return bool(list_checkpoints(folder / CHECKPOINTS))


def is_finished(folder: Path) -> bool:
    """Whether the run's results were written."""
    return (folder / model_file.FILE_NAME).exists() and (folder / SUMMARY).exists()


def cut_metrics(folder: Path, start: Position) -> None:
    """Drop the lines of what will be done again after a resume from `start`."""
    path = folder / METRICS
    if not path.exists():
        return
    kept: list[str] = []
    last = 0
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):
            break  # the line that was being written when the run was killed; nothing follows it
        # A run stopped behind an epoch's last step has a line there, and a second one once it has evaluated.
        if step > start.step or (step == last == start.step and start.batches):
            break
        kept.append(line + "\n")
        last = step
    write_atomically(path, "".join(kept).encode())


def first_difference(before: Any, now: Any, path: str = "") -> str:
    """Where two resolved jobs part, such as `training.seed was 1 and is 2`; empty where they agree."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            found = first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            found = first_difference(one, other, f"{path}[{index}]")
            if found:
                return found
        return ""
    return "" if before == now else f"{path} was {before} and is {now}"


def _fixed_part(job: dict[str, Any]) -> dict[str, Any]:
    fixed = dict(job)
    for name, inner in MAY_CHANGE.items():
        if inner is None:
            fixed.pop(name, None)
        elif isinstance(fixed.get(name), dict):
            fixed[name] = {key: value for key, value in fixed[name].items() if key not in inner}
    return fixed
