"""The verbs of `paceline`: what can be typed, and which function does it.

Rules: a verb parses, calls, prints. What it needs is imported when it runs, so that `paceline --help` is quick.
The verbs of paceline-worker never come here (__main__.py).
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from coordinator.client_options import LISTEN, Connect, asks_coordinator
from coordinator.state_folder import default_state
from coordinator.token_verbs import app as token_app
from protos.environment import STORE

HTTP = "127.0.0.1:8080"

app = typer.Typer(
    help="Train neural networks on CPUs, across processes and machines.",
    epilog="Verbs of paceline-worker, typed alike: train JOB.yaml -o DIR, evaluate DIR JOB.yaml, predict DIR INPUT, "
    "plan JOB.yaml --nodes N --bandwidth B, join DIR, follow DIR.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # Rich is loaded only where a live bar is drawn
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(token_app, name="token")


class Format(StrEnum):
    """How a verb prints."""

    text = "text"
    json = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="json: one document, or a line an event where there are many.")
]
JobFileArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file, YAML or JSON.")]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as submit and list print it.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="PATH=VALUE", help="Override a field, such as training.epochs=5.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"paceline {version('paceline')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------- without a coordinator


@app.command()
def run(
    job_file: JobFileArgument,
    workers: Annotated[int | None, typer.Option("-n", min=1, help="Workers, in place of the job file's.")] = None,
    output: Annotated[Path | None, typer.Option("-o", metavar="DIR", help="Output folder; runs/NAME-TIME.")] = None,
    settings: SetOption = [],  # noqa: B006  # Typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    output_format: FormatOption = Format.text,
) -> None:
    """Train here and now, without a coordinator."""
    from coordinator.run import RunOptions, run

    options = RunOptions(job_file, workers, output, tuple(settings), resume, output_format is Format.json)
    raise typer.Exit(run(options))


@app.command()
def serve(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where gRPC is served.")] = LISTEN,
    http: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where /metrics is served.")] = HTTP,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Jobs, logs and output; ~/.local/state/paceline.")
    ] = None,
    data_root: Annotated[
        list[str], typer.Option(metavar="DIR_OR_URL", help="Jobs may read data only below it; may be given again.")
    ] = [],  # noqa: B006  # Typer copies it
    slots: Annotated[
        int | None, typer.Option(min=1, help="Workers that may run at once; the launcher's cores.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(metavar="NAME", help="How jobs are started: local, ssh, slurm, kubernetes.")
    ] = "local",
    launcher_option: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE", help="Such as partition=cpu; may be given again. A wrong name lists them all."
        ),
    ] = [],  # noqa: B006  # Typer copies it
    store: Annotated[
        str,
        typer.Option(envvar=STORE, metavar="URL", help="PostgreSQL for the jobs, in place of SQLite in --state."),
    ] = "",
    limit: Annotated[
        list[str],
        typer.Option(metavar="NAME=N", help="Such as user.running=4; may be given again. A wrong name lists them all."),
    ] = [],  # noqa: B006  # Typer copies it
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM; speak TLS with it. Read again when it changes.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM; clients must show a certificate it vouches for.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without TLS, and without tokens if none is made.")
    ] = False,
) -> None:
    """Start a coordinator: takes jobs, queues and launches them."""
    from coordinator.certificates import TlsFiles
    from coordinator.serve import serve

    if (tls_certificate is None) != (tls_key is None) or (tls_client_ca and tls_certificate is None):
        raise typer.BadParameter("--tls-certificate and --tls-key go together, and --tls-client-ca with both")
    tls = TlsFiles(tls_certificate, tls_key, tls_client_ca) if tls_certificate and tls_key else None
    here = state or default_state()
    raise typer.Exit(
        serve(listen, http, here, data_root, slots, store, limit, tls, insecure, launcher, launcher_option)
    )


@app.command()
def demo() -> None:
    """Train on real handwritten digits, through every part."""
    from coordinator.demo import demo

    raise typer.Exit(demo())


# ------------------------------------------------------------------------------------------------- with a coordinator


@app.command()
@asks_coordinator
def submit(
    connect: Connect,
    job_file: JobFileArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job and exit with its result.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the job, here and there; start nothing.")] = False,
    request_id: Annotated[
        str, typer.Option(metavar="ID", help="Makes it safe to repeat: the same id gives the same job.")
    ] = "",
    settings: SetOption = [],  # noqa: B006  # Typer copies it
    output_format: FormatOption = Format.text,
) -> None:
    """Hand a job to the coordinator; prints its id."""
    from coordinator.follow import follow_job
    from coordinator.presentation import document, json_line, printable, state_line
    from coordinator.run import load_job

    if watch and dry_run:
        raise typer.BadParameter("--watch has nothing to follow with --dry-run")
    spec = load_job(job_file, settings)
    as_json = output_format is Format.json
    with connect() as client:
        job = client.submit(spec, request_id, validate_only=dry_run)
        if dry_run:
            text = f"valid: {printable(spec.name)}, {spec.training.epochs} epochs, workers {spec.workers}"
            print(json_line({"valid": True, "spec": document(job.spec)}) if as_json else text)
            return
        if not watch:
            print(json_line(job) if as_json else job.id)
            if sys.stdout.isatty() and not as_json:
                print(f"{state_line(job)}; follow it with: paceline watch {job.id}", file=sys.stderr)
            return
        if not as_json:
            print(job.id, flush=True)
        raise typer.Exit(follow_job(client, job.id, as_json))


@app.command("list")
@asks_coordinator
def list_jobs(
    connect: Connect,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    state: Annotated[str, typer.Option(metavar="STATE", help="Those in this state alone.")] = "",
    label: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="Those with this label alone; may be given again.")
    ] = [],  # noqa: B006  # Typer copies it
    owner: Annotated[str, typer.Option(metavar="NAME", help="Those of this user alone.")] = "",
    filter_text: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help='Such as "labels.team=vision AND priority>=5".')
    ] = "",
    output_format: FormatOption = Format.text,
) -> None:
    """Show the jobs, newest first."""
    from coordinator.listing import list_filter
    from coordinator.presentation import document, job_table, json_line

    whole_filter = list_filter(state, label, owner, filter_text)
    with connect() as client:
        jobs, more = client.list_jobs(limit, whole_filter)
    if output_format is Format.json:
        print(json_line({"jobs": [document(job) for job in jobs], "more": more}))
        return
    none = f"no jobs with {whole_filter}" if whole_filter else "no jobs yet; hand one in with: paceline submit JOB.yaml"
    print(job_table(jobs, datetime.now(UTC)) if jobs else none)
    if more:
        print(f"there are older ones; see them with --limit {limit * 10}", file=sys.stderr)


@app.command()
@asks_coordinator
def get(connect: Connect, job_id: JobArgument, output_format: FormatOption = Format.text) -> None:
    """Show everything about a job."""
    from coordinator.presentation import job_text, json_line

    with connect() as client:
        job = client.get(job_id)
    print(json_line(job) if output_format is Format.json else job_text(job))


@app.command()
@asks_coordinator
def watch(connect: Connect, job_id: JobArgument, output_format: FormatOption = Format.text) -> None:
    """Follow a job to its end; Ctrl-C leaves it running."""
    from coordinator.follow import follow_job

    with connect() as client:
        raise typer.Exit(follow_job(client, job_id, output_format is Format.json))


@app.command()
@asks_coordinator
def logs(
    connect: Connect,
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="This rank's lines alone.")] = None,
    output_format: FormatOption = Format.text,
) -> None:
    """Print what the launcher and the ranks wrote."""
    from coordinator.follow import INTERRUPTED, say_it_goes_on
    from coordinator.presentation import json_line, printable

    with connect() as client:
        try:
            for line in client.logs(job_id, follow, rank):
                text = printable(line.line) if sys.stdout.isatty() else line.line
                print(json_line(line) if output_format is Format.json else f"{line.source} | {text}", flush=follow)
        except KeyboardInterrupt:
            say_it_goes_on(client, job_id)
            raise typer.Exit(INTERRUPTED) from None


@app.command()
@asks_coordinator
def metrics(
    connect: Connect,
    job_id: JobArgument,
    as_csv: Annotated[bool, typer.Option("--csv", help="Every number, comma-separated.")] = False,
    output_format: FormatOption = Format.text,
) -> None:
    """Print the job's reports: loss, accuracy, speed."""
    from coordinator.presentation import document, json_line, report_csv, report_table

    if as_csv and output_format is Format.json:
        raise typer.BadParameter("--csv and --format json exclude each other")
    with connect() as client:
        reports = client.metrics(job_id)
    if output_format is Format.json:
        print(json_line({"reports": [document(report) for report in reports]}))
    elif as_csv:
        print(report_csv(reports), end="")
    elif reports:
        print(report_table(reports))
    else:
        print(f"job {job_id} has reported nothing yet", file=sys.stderr)


@app.command()
@asks_coordinator
def cancel(connect: Connect, job_id: JobArgument, output_format: FormatOption = Format.text) -> None:
    """End a job, queued or running."""
    from coordinator.presentation import json_line, state_line

    with connect() as client:
        job = client.cancel(job_id)
    print(json_line(job) if output_format is Format.json else f"{job.id} is {state_line(job)}")


@app.command()
@asks_coordinator
def pause(connect: Connect, job_id: JobArgument, output_format: FormatOption = Format.text) -> None:
    """Let a job write a checkpoint and give its slots back; `resume` goes on with it."""
    from coordinator.presentation import json_line, state_line

    with connect() as client:
        job = client.pause(job_id)
    print(json_line(job) if output_format is Format.json else f"{job.id} is {state_line(job)}")


@app.command()
@asks_coordinator
def resume(connect: Connect, job_id: JobArgument, output_format: FormatOption = Format.text) -> None:
    """Queue a paused job again; it goes on from its checkpoint."""
    from coordinator.presentation import json_line, state_line

    with connect() as client:
        job = client.resume(job_id)
    print(json_line(job) if output_format is Format.json else f"{job.id} is {state_line(job)}")


@app.command()
@asks_coordinator
def pull(
    connect: Connect,
    job_id: JobArgument,
    output: Annotated[Path | None, typer.Option("-o", metavar="DIR", help="Where to; runs/ID.")] = None,
    output_format: FormatOption = Format.text,
) -> None:
    """Fetch the output folder of a job that has ended."""
    from coordinator.presentation import json_line
    from coordinator.pull import check_destination, write_folder

    folder = output or Path("runs") / job_id
    check_destination(folder)
    with connect() as client:
        files, written = write_folder(client.pull(job_id), folder)
    if output_format is Format.json:
        print(json_line({"output": str(folder), "files": files, "bytes": written}))
    else:
        print(f"{folder}: {files} files, {written / 1e6:,.1f} MB")
