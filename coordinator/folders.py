"""Where a job's files are: STATE_DIR/jobs/ID/ with job.yaml, logs/ and output/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from coordinator.jobs import Job, is_id
from protos import job_pb2
from protos.job_file import to_yaml


class SummaryUnreadable(Exception):
    """summary.json is missing or damaged; the message says which."""


@dataclass(frozen=True)
class JobFolder:
    """The paths of one job. Nothing is read or made before a method is called."""

    path: Path

    @property
    def job_file(self) -> Path:
        return self.path / "job.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def metrics(self) -> Path:
        return self.output / "metrics.jsonl"

    @property
    def has_checkpoint(self) -> bool:
        """Whether an attempt got far enough to leave one, good or damaged."""
        return any((self.output / "checkpoints").glob("step-*.safetensors"))

    def create(self, job: Job) -> None:
        """Make the folder and write the job file into it; the output folder is the worker's to make."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.job_file.write_text(to_yaml(job.spec), encoding="utf-8")

    def summary(self) -> job_pb2.Summary:
        """What the workers left in output/summary.json, raising SummaryUnreadable."""
        path = self.output / "summary.json"
        try:
            text = path.read_text(encoding="utf-8")
            return json_format.Parse(text, job_pb2.Summary(), ignore_unknown_fields=True)
        except FileNotFoundError:
            raise SummaryUnreadable("the launcher ended well but left no summary.json") from None
        except (OSError, UnicodeDecodeError, json_format.ParseError) as fault:
            raise SummaryUnreadable(f"the launcher ended well but its summary.json cannot be read: {fault}") from fault


def write_atomically(path: Path, text: str) -> None:
    """Readers find the old text or the new one."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def job_folder(state: Path, job_id: str) -> JobFolder:
    """The folder of a job. ValueError for a text that is no job id: it never becomes a path."""
    if not is_id(job_id):
        raise ValueError(f"{job_id!r} is not a job id")
    return JobFolder(state / "jobs" / job_id)
