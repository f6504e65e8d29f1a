"""`paceline token create | list | revoke`: tokens are made and revoked by whoever may write a coordinator's store.

Rules: no coordinator is asked, so it works before the first token, and while one runs, which takes the change up
within a second. A secret is printed once, alone on standard output. Every deed is in the audit log.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.state_folder import default_state
from protos.environment import STORE

if TYPE_CHECKING:
    from coordinator.tokens import Tokens

app = typer.Typer(
    help="Make, list and revoke the tokens of those who call a coordinator.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Whose token: also the owner of the jobs it submits.")
]
StateOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The coordinator's --state; ~/.local/state/paceline.")
]
StoreOption = Annotated[
    str, typer.Option(envvar=STORE, metavar="URL", help="The coordinator's --store, if it has one.")
]


@app.command()
def create(
    name: NameArgument,
    role: Annotated[
        str,
        typer.Option(
            metavar="ROLE",
            help="viewer: sees all jobs. submitter: submits, sees and ends own jobs. administrator: everything.",
        ),
    ],
    expires: Annotated[str, typer.Option(metavar="TIME", help="Good for so long: 30d, 12h, 45m; else for ever.")] = "",
    state: StateOption = None,
    store: StoreOption = "",
) -> None:
    """Make a token and print it, this once."""
    from coordinator.tokens import read_duration, read_role

    with _tokens("token create", name, state, store) as tokens:
        now = datetime.now(UTC)
        secret = tokens.create(name, read_role(role), now + read_duration(expires) if expires else None, now)
    print(secret)
    if sys.stdout.isatty():
        print("it is not shown again; keep it in a file of mode 0600 and give --token-file FILE", file=sys.stderr)


@app.command("list")
def list_tokens(
    state: StateOption = None,
    store: StoreOption = "",
    output_format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="text or json.")] = "text",
) -> None:
    """Show every token there ever was; never its secret."""
    import json

    if output_format not in ("text", "json"):
        raise typer.BadParameter(f"{output_format!r} is not text or json", param_hint="--format")
    with _tokens("", "", state, store) as tokens:
        found = tokens.all()
    now = datetime.now(UTC)
    if output_format == "json":
        rows = [
            {
                "name": token.name,
                "role": token.role.value,
                "state": token.state(now),
                "created": token.created.isoformat(),
                "expires": token.expires.isoformat() if token.expires else None,
                "revoked": token.revoked.isoformat() if token.revoked else None,
            }
            for token in found
        ]
        print(json.dumps({"tokens": rows}))
        return
    for token in found:
        until = f", until {token.expires:%Y-%m-%d %H:%M} UTC" if token.expires else ""
        print(f"{token.name:<24} {token.role:<14} {token.state(now):<8} made {token.created:%Y-%m-%d %H:%M} UTC{until}")
    if not found:
        print("no tokens; make one with: paceline token create NAME --role administrator", file=sys.stderr)


@app.command()
def revoke(name: NameArgument, state: StateOption = None, store: StoreOption = "") -> None:
    """Refuse the name's token from now on; its jobs stay."""
    with _tokens("token revoke", name, state, store) as tokens:
        tokens.revoke(name, datetime.now(UTC))


@contextlib.contextmanager
def _tokens(call: str, name: str, state: Path | None, store: str) -> Iterator[Tokens]:
    """The tokens of that store; CommandFault where it or what was asked cannot be. A call with a name is recorded."""
    from coordinator.audit import AuditLog, Deed
    from coordinator.database import Database, StoreUnavailable, StoreUnusable, read_store, sqlite_at
    from coordinator.faults import CommandFault
    from coordinator.tokens import TokenInvalid, Tokens
    from protos.exit_codes import ExitCode

    folder = (state or default_state()).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        url = read_store(store) if store else sqlite_at(folder / "paceline.sqlite")
        database = Database(url, beside=True)
    except OSError as fault:
        raise CommandFault(f"--state: cannot use {folder}: {fault.strerror}") from fault
    except ValueError as fault:
        raise CommandFault(f"--store: {fault}", ExitCode.USAGE) from fault
    except StoreUnusable as fault:
        raise CommandFault(str(fault)) from fault
    try:
        yield Tokens(database)
        if call:
            deed = Deed(call, f"user {_user()} of this machine", "administrator", name, f"pid:{os.getpid()}", "OK")
            AuditLog(folder, lambda: datetime.now(UTC)).write(deed)
    except TokenInvalid as fault:
        raise CommandFault(str(fault), ExitCode.USAGE) from fault
    except StoreUnavailable as fault:
        raise CommandFault(str(fault)) from fault
    finally:
        database.close()


def _user() -> str:
    """The name of the user this runs as; in a container there may be a number alone."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
