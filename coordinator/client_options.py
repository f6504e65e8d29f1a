"""The options of every verb that asks a coordinator: where it is, who asks, and how the line is kept safe.

Rules: written once, here. A verb takes `connect` first, a function that opens its client; in its place it gets the
options of `_connection`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protos.environment import SERVER_ADDRESS, TLS, TLS_CA, TLS_CERTIFICATE, TLS_KEY, TOKEN, TOKEN_FILE

if TYPE_CHECKING:
    from coordinator.client import Client

LISTEN = "127.0.0.1:50051"

Connect = Callable[[], "Client"]
_LATER = {"Client": object}  # imported when a verb runs


def asks_coordinator(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with those options in place of its first parameter."""
    connection = inspect.signature(_connection, eval_str=True, locals=_LATER).parameters
    own = list(inspect.signature(verb, eval_str=True, locals=_LATER).parameters.values())[1:]

    @functools.wraps(verb)
    def typed(**options: Any) -> None:
        verb(functools.partial(_connection, **{name: options.pop(name) for name in connection}), **options)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *connection.values())]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del typed.__wrapped__  # Typer would read that one's annotations
    return typed


def _connection(
    server: Annotated[
        str, typer.Option("--server", envvar=SERVER_ADDRESS, metavar="HOST:PORT", help="The coordinator to ask.")
    ] = LISTEN,
    token_file: Annotated[
        Path | None, typer.Option(envvar=TOKEN_FILE, metavar="FILE", help=f"Holds your token; or {TOKEN} does.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", envvar=TLS, help="Speak TLS; trust whom this machine trusts.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(envvar=TLS_CA, metavar="FILE", help="Speak TLS; trust these certificates alone.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(envvar=TLS_CERTIFICATE, metavar="FILE", help="Yours, where one is asked for.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar=TLS_KEY, metavar="FILE", help="The key of yours.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the token unencrypted, for others to read.")
    ] = False,
) -> Client:
    import os

    from coordinator.client import Client
    from coordinator.credentials import read_credentials

    token = os.environ.get(TOKEN, "")
    return Client(server, read_credentials(token, token_file, tls, tls_ca, tls_certificate, tls_key, insecure))
