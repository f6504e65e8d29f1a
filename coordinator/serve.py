"""Builds the coordinator out of its parts and runs it until it is told to stop.

Rules: everything that can refuse to start does so before a job is touched: the folder's lock, the store, the
certificate, both ports.
Settings arrive as arguments; the parts get clock, registry and paths from here and read none of their own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import grpc
import sqlalchemy as sa
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from coordinator.addresses import Address, AddressInvalid, AddressUnusable, check_free, parse_address, unusable
from coordinator.answers import SHORT_CALLS_AT_MOST, STREAMS_AT_MOST
from coordinator.audit import AuditLog
from coordinator.callers import Callers
from coordinator.certificates import Certificates, CertificateUnusable, TlsFiles
from coordinator.changes import Changes
from coordinator.clock import steady_clock
from coordinator.controller import Controller
from coordinator.database import StoreUnavailable, StoreUnusable, read_store, sqlite_at
from coordinator.exposure import exposure_fault, exposure_warning, no_token_yet
from coordinator.guard import Guard
from coordinator.http_port import HttpPort, Refusal
from coordinator.launchers import local
from coordinator.launchers.options import OptionInvalid
from coordinator.launching import Choice, choose, make_launcher, unreachable_warning
from coordinator.metrics import Metrics
from coordinator.metrics_guard import MetricsGuard
from coordinator.quotas import DEFAULT_QUOTAS, Quotas, read_quotas
from coordinator.scheduler import Capacity
from coordinator.service import CoordinatorService
from coordinator.state_folder import CannotServe, locked
from coordinator.store import Store
from protos import coordinator_pb2, coordinator_pb2_grpc
from protos.exit_codes import ExitCode
from protos.urls import is_url

STOP_LOOK_SECONDS = 0.5
CLOSE_SECONDS = 2.0  # for calls that are still open when the coordinator stops
LOCAL = Choice()
SERVICE_NAME = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
_HEALTH = (health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True)
class Settings:
    """What a coordinator is told. Port 0 takes a free one."""

    listen: Address
    http: Address
    state: Path
    data_roots: tuple[Path | str, ...]  # resolved paths, and URLs; none means jobs may read anywhere
    slots: int
    mpirun: str
    worker: str
    store: sa.URL | None = None  # None: SQLite in the state folder
    quotas: Quotas = DEFAULT_QUOTAS
    tls: TlsFiles | None = None
    launcher: Choice = LOCAL
    insecure: bool = False  # others may reach it without a certificate, and without tokens where none was made
    start_deadline_seconds: float = 60.0
    grace_seconds: float = 5.0


def serve(
    listen: str,
    http: str,
    state: Path,
    data_roots: Sequence[str],
    slots: int | None,
    store: str = "",
    limits: Sequence[str] = (),
    tls: TlsFiles | None = None,
    insecure: bool = False,
    launcher: str = LOCAL.name,
    launcher_options: Sequence[str] = (),
) -> int:
    """Run a coordinator until SIGTERM or SIGINT and return the exit code.

    SIGINT, as Ctrl-C sends it, ends the launched jobs too; SIGTERM, as it comes with an upgrade, leaves them running
    for the next coordinator on the same state folder.

    listen, http: `HOST:PORT`. state: the folder of the store and the jobs' files, made when it is missing.
    data_roots: where jobs may read data; none means anywhere. slots: how many ranks may run at once; None: as many as
    the launcher has cores for.
    store: a PostgreSQL database in place of the SQLite file in the state folder. limits: `NAME=NUMBER` each, the names
    in quotas.LIMITS. tls: what the coordinator shows of itself. insecure: others may reach it all the same without.
    launcher: a name in launching.LAUNCHERS; launcher_options: `NAME=VALUE` each, the names in its row.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # an Event set by a handler can meet its own wait and lock up

    def asked(number: int, _frame: FrameType | None) -> None:
        stop.put(number)

    previous = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        settings = read_settings(
            listen, http, state, data_roots, slots, store, limits, tls, insecure, launcher, launcher_options
        )
        with running(settings) as coordinator:
            print(coordinator.ready_line(), flush=True)
            coordinator.ends_jobs = _first(stop) != signal.SIGTERM
    except CannotServe as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ExitCode.DONE


def _first(stop: queue.SimpleQueue[int]) -> int:
    """The first signal. In short waits: one that comes just before a wait begins does not end it."""
    while True:
        with contextlib.suppress(queue.Empty):
            return stop.get(timeout=STOP_LOOK_SECONDS)


def read_settings(
    listen: str,
    http: str,
    state: Path,
    data_roots: Sequence[str],
    slots: int | None,
    store: str = "",
    limits: Sequence[str] = (),
    tls: TlsFiles | None = None,
    insecure: bool = False,
    launcher: str = LOCAL.name,
    launcher_options: Sequence[str] = (),
) -> Settings:
    """Check what was typed, raising CannotServe; --insecure is told what it means."""
    try:
        listen_address, http_address = parse_address("--listen", listen), parse_address("--http", http)
    except AddressInvalid as fault:
        raise CannotServe(str(fault), ExitCode.USAGE) from fault
    reached = [(f"--listen {listen}", listen_address), (f"--http {http}", http_address)]
    if refused := exposure_fault(reached, tls is not None, insecure):
        raise CannotServe(refused, ExitCode.USAGE)
    if warning := exposure_warning(reached, tls is not None):
        print(f"warning: {warning}", file=sys.stderr)
    if slots is not None and slots < 1:
        raise CannotServe(f"--slots: {slots} is not at least 1", ExitCode.USAGE)
    try:
        url = read_store(store) if store else None
    except ValueError as fault:  # what was given may hold a password
        raise CannotServe(f"--store: {fault}", ExitCode.USAGE) from fault
    try:
        quotas = read_quotas(limits)
    except ValueError as fault:
        raise CannotServe(f"--limit: {fault}", ExitCode.USAGE) from fault
    for root in data_roots:
        if not is_url(root) and not Path(root).is_dir():
            raise CannotServe(f"--data-root: {root} is not a folder", ExitCode.USAGE)
    try:
        mpirun, worker = local.find_mpirun(), local.find_worker()
        choice, room = choose(launcher, launcher_options, state.absolute())
    except local.LauncherMissing as fault:
        raise CannotServe(str(fault)) from fault
    except OptionInvalid as fault:
        raise CannotServe(str(fault), ExitCode.USAGE) from fault
    if choice.bounded and slots is not None and slots > room:
        raise CannotServe(f"--slots: {slots} is above {room}, what the host file has in all", ExitCode.USAGE)
    if warning := unreachable_warning(listen_address, choice):
        print(f"warning: {warning}", file=sys.stderr)
    roots = tuple(root if is_url(root) else Path(root).resolve() for root in data_roots)
    return Settings(
        listen_address,
        http_address,
        state.absolute(),
        roots,
        slots or room,
        mpirun,
        worker,
        store=url,
        quotas=quotas,
        tls=tls,
        insecure=insecure,
        launcher=choice,
    )


class Coordinator:
    """A running coordinator: what it listens on, and what the parts are."""

    def __init__(self, settings: Settings, store: Store, registry: CollectorRegistry) -> None:
        self.settings = settings
        self.tokens = store.tokens
        self.registry = registry
        self.ends_jobs = True  # when it stops
        self._stopping = False
        self._changes = Changes()
        metrics = Metrics(settings.slots, _now, store.count_by_state, registry)
        self._certificates = Certificates(settings.tls) if settings.tls else None
        audit = AuditLog(settings.state, _now)
        exposed = [address for address in (settings.listen, settings.http) if not address.loopback]
        tokens_needed = bool(exposed) and not settings.insecure
        if tokens_needed and not store.tokens.all():
            raise CannotServe(no_token_yet(settings.state, settings.store is not None), ExitCode.USAGE)
        callers = Callers(store.tokens.all, _now, tokens_needed=tokens_needed)
        self.http = _http_port(
            settings.http, registry, self.fault, MetricsGuard(callers, audit).refusal, self._certificates
        )
        try:
            guard = Guard(SERVICE_NAME, callers, store.owner, audit)
            self._server, self._health, self.grpc_address = _grpc_server(settings.listen, guard, self._certificates)
        except AddressUnusable:
            self.http.stop()
            raise
        self.controller = Controller(
            store=store,
            launcher=make_launcher(
                settings.launcher,
                mpirun=settings.mpirun,
                worker=settings.worker,
                state=settings.state,
                listening=self.grpc_address,
                certificates=self._certificates,
                data_roots=settings.data_roots,
                job_parameters=settings.quotas.job_parameters,
            ),
            metrics=metrics,
            changes=self._changes,
            state=settings.state,
            capacity=Capacity(settings.slots, settings.start_deadline_seconds, settings.quotas),
            clock=steady_clock(_now),
            grace_seconds=settings.grace_seconds,
        )
        service = CoordinatorService(
            controller=self.controller,
            store=store,
            changes=self._changes,
            state=settings.state,
            data_roots=settings.data_roots,
            slots=settings.slots,
            quotas=settings.quotas,
            caller=lambda context: callers.of(context.invocation_metadata()),
        )
        add_service = coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server
        add_service(service, self._server)  # type: ignore[no-untyped-call]  # generated without types

    def start(self) -> None:
        self.controller.start()
        self._server.start()
        self.http.start()
        self._set_serving(True)

    def stop(self) -> None:
        """No new jobs, then no launched jobs if `ends_jobs`, then no watchers, then no calls."""
        self._stopping = True
        self._set_serving(False)
        self.controller.stop(self.ends_jobs)
        self._changes.close()
        self._server.stop(CLOSE_SECONDS).wait(CLOSE_SECONDS + 1)
        self.http.stop()

    def fault(self) -> str | None:
        """What is wrong, for /healthz."""
        return "stopping" if self._stopping else self.controller.fault

    def ready_line(self) -> str:
        http = Address(self.settings.http.host, self.http.port)
        slots = f"{self.settings.slots} {'slot' if self.settings.slots == 1 else 'slots'}"
        return (
            f"paceline coordinator ready: grpc {self.grpc_address}, http {http}, state {self.settings.state}, {slots}"
        )

    def _set_serving(self, serving: bool) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, _HEALTH[serving])


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Coordinator]:
    """A coordinator that serves inside the `with` block; it leaves no process behind unless told to. CannotServe."""
    with locked(settings.state), contextlib.ExitStack() as opened:
        registry = CollectorRegistry()
        try:
            store = Store(settings.store or sqlite_at(settings.state / "paceline.sqlite"))
            opened.callback(store.close)
            coordinator = Coordinator(settings, store, registry)
            opened.callback(coordinator.stop)
            coordinator.start()
        except (StoreUnusable, StoreUnavailable, AddressUnusable) as fault:
            raise CannotServe(str(fault)) from fault
        except CertificateUnusable as fault:
            raise CannotServe(str(fault), ExitCode.USAGE) from fault
        yield coordinator


# -------------------------------------------------------------------------------------------------------------- parts


def _now() -> datetime:
    return datetime.now(UTC)


def _http_port(
    address: Address,
    registry: CollectorRegistry,
    fault: Callable[[], str | None],
    refusal: Refusal,
    certificates: Certificates | None,
) -> HttpPort:
    try:
        return HttpPort(*address, registry, fault, refusal, certificates)
    except OSError as error:
        raise unusable("--http", address, error) from error


def _grpc_server(
    listen: Address, guard: Guard, certificates: Certificates | None
) -> tuple[grpc.Server, health.HealthServicer, Address]:
    """A bound server that does not answer yet."""
    check_free("--listen", listen)
    server = grpc.server(
        ThreadPoolExecutor(STREAMS_AT_MOST + SHORT_CALLS_AT_MOST, thread_name_prefix="grpc"),
        interceptors=[guard],
        options=[("grpc.so_reuseport", 0)],  # else a second coordinator would share the port and take half the calls
    )
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if certificates is None:
            port = server.add_insecure_port(str(listen))
        else:
            port = server.add_secure_port(str(listen), certificates.grpc_credentials())
    except RuntimeError as fault:  # taken since the check
        raise AddressUnusable(f"--listen: cannot listen on {listen}: {fault}") from fault
    return server, servicer, Address(listen.host, port)
