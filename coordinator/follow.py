"""Follows a job of the coordinator to its end and says how it went."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from coordinator.client import ENDED, Client
from coordinator.faults import CommandFault
from coordinator.presentation import facts_text, printable, state_line, state_name, summary_facts
from coordinator.progress import Display, open_display
from protos import job_pb2
from protos.exit_codes import ExitCode

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def follow_job(client: Client, job_id: str, as_json: bool) -> int:
    """Show the job's progress until it ends; the exit code is its result. Ctrl-C ends the watching, not the job."""
    job: job_pb2.Job | None = None
    try:
        job = _show(client, job_id, as_json)
    except KeyboardInterrupt:
        say_it_goes_on(client, job_id)
        return INTERRUPTED
    if not as_json and job.state == job_pb2.JOB_STATE_SUCCEEDED:
        print(ending_text(job), flush=True)
    if job.state != job_pb2.JOB_STATE_SUCCEEDED:
        raise CommandFault(ended_badly(job))
    return ExitCode.DONE


def ended_badly(job: job_pb2.Job) -> str:
    """Why, with the last log lines the coordinator sent along."""
    message, _, rest = printable(job.message).partition("\n")
    why = f"job {job.id} is {state_name(job.state)}: {message}; all it wrote: paceline logs {job.id}"
    return "\n".join([why, *(f"  {line}" for line in rest.splitlines())])


def ending_text(job: job_pb2.Job) -> str:
    """The last words about a job that has ended."""
    words = job_words(job)
    return f"{words}\n{facts_text(summary_facts(job.summary))}" if job.HasField("summary") else words


def job_words(job: job_pb2.Job) -> str:
    """The job's state in a line of its own."""
    return f"{printable(job.spec.name)}: {state_line(job)}"


def say_it_goes_on(client: Client, job_id: str) -> None:
    print(f"\nno longer watching; job {job_id} goes on. To end it: {cancel_command(client, job_id)}", file=sys.stderr)


def cancel_command(client: Client, job_id: str) -> str:
    return f"paceline cancel {job_id} --server {client.address}"


def _show(client: Client, job_id: str, as_json: bool) -> job_pb2.Job:
    job = client.get(job_id)
    with ExitStack() as opened:
        display: Display = opened.enter_context(open_display(as_json, job.spec.training.epochs))
        for event in client.watch(job_id):
            if isinstance(event, job_pb2.Report):
                display.report(event)
                continue
            job = event
            # What has ended is told once and last; a job that ended long ago is sent before its reports.
            if as_json or job.state not in ENDED:
                display.state(job_words(job), job)
    return job
