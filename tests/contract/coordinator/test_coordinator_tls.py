"""TLS between a real coordinator, its clients and its workers, with certificates of a CA of the test's own."""

import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import grpc
import pytest

from coordinator.addresses import Address
from coordinator.certificates import TlsFiles
from coordinator.client import Client
from coordinator.credentials import Credentials
from coordinator.database import Database, sqlite_at
from coordinator.faults import CommandFault
from coordinator.serve import CannotServe, running
from coordinator.state_folder import locked
from coordinator.tokens import Role, Tokens
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, job_pb2
from protos.exit_codes import ExitCode
from tests.authority import Authority
from worker.coordinator_client import connect

DEADLINE_SECONDS = 20


@pytest.fixture
def authority(tmp_path) -> Authority:
    (tmp_path / "certificates").mkdir()
    return Authority(tmp_path / "certificates")


@pytest.fixture
def secure(settings, authority) -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts a coordinator with a certificate, and says how to reach it."""
    with ExitStack() as stack:

        def start(client_ca: bool = False, **changed: object) -> SimpleNamespace:
            pair = authority.issue()
            files = TlsFiles(*pair, authority.ca if client_ca else None)
            coordinator = stack.enter_context(running(replace(settings, tls=files, **changed)))
            address = str(coordinator.grpc_address.for_this_machine())
            trusting = Credentials(tls=True, ca=authority.ca.read_bytes())
            return SimpleNamespace(coordinator=coordinator, address=address, pair=pair, trusting=trusting)

        yield start


def fault_of(address: str, credentials: Credentials) -> CommandFault:
    with pytest.raises(CommandFault) as fault, Client(address, credentials) as client:
        client.list_jobs(1)
    assert len(str(fault.value).splitlines()) == 1
    return fault.value


def until(wanted: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not wanted():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_client_that_trusts_the_authority_is_answered_and_others_are_told_what_differs(secure, authority) -> None:
    at = secure()
    with Client(at.address, at.trusting) as client:
        assert client.list_jobs(1) == ([], False)
    stranger = Credentials(tls=True, ca=Authority(authority.ca.parent, "stranger").ca.read_bytes())
    wanted = {
        Credentials(): "speaks TLS: give --tls-ca FILE",
        stranger: "is not accepted: unable to get local issuer certificate",
        Credentials(tls=True): "is not accepted: ",
    }
    for credentials, words in wanted.items():
        fault = fault_of(at.address, credentials)
        assert words in str(fault)
        assert fault.exit_code == ExitCode.UNREACHABLE
    elsewhere = fault_of(at.address.replace("127.0.0.1", "localhost"), at.trusting)
    assert "is not accepted: Hostname mismatch" in str(elsewhere)


def test_a_client_that_wants_tls_of_a_coordinator_without_is_told_so(talk, authority) -> None:
    fault = fault_of(str(talk.coordinator.grpc_address), Credentials(tls=True, ca=authority.ca.read_bytes()))
    assert "speaks no TLS" in str(fault)
    assert fault.exit_code == ExitCode.UNREACHABLE


def test_with_a_client_ca_a_certificate_is_asked_for_by_grpc_and_http(secure, authority) -> None:
    at = secure(client_ca=True)
    mine = authority.issue("ada", hosts=("ada.example.org",))
    shown = {"certificate": mine.certificate.read_bytes(), "key": mine.key.read_bytes()}
    with Client(at.address, replace(at.trusting, **shown)) as client:
        assert client.list_jobs(1) == ([], False)
    assert "asks for a client certificate" in str(fault_of(at.address, at.trusting))
    theirs = Authority(authority.ca.parent, "stranger").issue("eve", hosts=("eve.example.org",))
    shown = {"certificate": theirs.certificate.read_bytes(), "key": theirs.key.read_bytes()}
    assert "does not accept this client's certificate" in str(fault_of(at.address, replace(at.trusting, **shown)))
    context = ssl.create_default_context(cafile=str(authority.ca))
    url = f"https://127.0.0.1:{at.coordinator.http.port}/healthz"
    with pytest.raises((urllib.error.URLError, OSError)):
        urllib.request.urlopen(url, timeout=DEADLINE_SECONDS, context=context)
    context.load_cert_chain(*mine)
    with urllib.request.urlopen(url, timeout=DEADLINE_SECONDS, context=context) as page:
        assert page.read() == b"ok\n"


@pytest.mark.parametrize("client_ca", [False, True])
def test_workers_report_over_tls_by_what_their_launcher_was_given(secure, environment_of, make_spec, client_ca) -> None:
    at = secure(client_ca=client_ca)
    credentials = at.trusting
    if client_ca:
        parts = {"certificate": at.pair.certificate.read_bytes(), "key": at.pair.key.read_bytes()}
        credentials = replace(credentials, **parts)
    with Client(at.address, credentials) as client:
        job_id = client.submit(make_spec("silent")).id
        until(lambda: environment_of(job_id) is not None, "the job's process")
        reporter = connect(environment_of(job_id))
        reporter.send({"step": 3, "epoch": 1, "samples": 30, "loss": 0.5}, [])
        until(lambda: client.get(job_id).progress.step == 3, "the report")
        assert client.get(job_id).state == job_pb2.JOB_STATE_RUNNING
        reporter.close()


def test_a_new_certificate_is_shown_without_a_restart_and_workers_follow_it(
    secure, authority, environment_of, make_spec
) -> None:
    at = secure()

    def shown(port: int) -> bytes:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=DEADLINE_SECONDS).encode()

    with Client(at.address, at.trusting) as client:
        job_id = client.submit(make_spec("silent")).id
        until(lambda: environment_of(job_id) is not None, "the job's process")
        before = at.pair.certificate.read_bytes()
        ports = (at.coordinator.grpc_address.port, at.coordinator.http.port)
        assert [shown(port) for port in ports] == [before, before]
        new = authority.issue("new")
        os.replace(new.key, at.pair.key)
        assert [shown(port) for port in ports] == [before, before]  # half of a pair is no pair
        os.replace(new.certificate, at.pair.certificate)
        after = at.pair.certificate.read_bytes()
        assert [shown(port) for port in ports] == [after, after] != [before, before]
        with Client(at.address, at.trusting) as newcomer:
            assert newcomer.get(job_id).id == job_id
        assert client.get(job_id).id == job_id  # whose connection is older
        reporter = connect(environment_of(job_id))
        reporter.send({"step": 7, "epoch": 1, "samples": 70, "loss": 0.5}, [])
        until(lambda: client.get(job_id).progress.step == 7, "the report")
        reporter.close()


def test_bound_elsewhere_it_wants_a_token_first_and_then_one_of_everybody(secure, settings) -> None:
    everywhere = Address("0.0.0.0", 0)
    with pytest.raises(CannotServe, match="no token was made yet: make the first with `paceline token create") as no:
        secure(listen=everywhere)
    assert no.value.exit_code == ExitCode.USAGE
    assert not settings.state.exists()
    with locked(settings.state):
        database = Database(sqlite_at(settings.state / "paceline.sqlite"), beside=True)
        secret = Tokens(database).create("root", Role.ADMINISTRATOR, None, datetime.now(UTC))
        database.close()
    at = secure(listen=everywhere)
    with Client(at.address, replace(at.trusting, token=secret)) as client:
        assert client.list_jobs(1) == ([], False)
    fault = fault_of(at.address, at.trusting)
    assert "asks for a token" in str(fault)
    assert fault.exit_code == ExitCode.NOT_ALLOWED


def test_insecure_lets_everybody_in_until_there_is_a_token(serve_with) -> None:
    talk = serve_with(listen=Address("0.0.0.0", 0), insecure=True)
    port = talk.coordinator.grpc_address.port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        assert not stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs
        talk.coordinator.tokens.create("root", Role.ADMINISTRATOR, None, datetime.now(UTC))

        def refused() -> bool:
            try:
                stub.ListJobs(pb.ListJobsRequest(), timeout=DEADLINE_SECONDS)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        until(refused, "a token being asked for")


@pytest.mark.parametrize("role", list(Role))
def test_metrics_are_for_who_sees_all_jobs_and_health_is_for_all(serve_with, role) -> None:
    talk = serve_with()
    secret = talk.coordinator.tokens.create("someone", role, None, datetime.now(UTC))
    base = f"http://127.0.0.1:{talk.coordinator.http.port}"

    def status(path: str, token: str = "") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(base + path, headers=headers), timeout=10) as page:
                return page.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    until(lambda: status("/metrics") == 401, "a token being asked for")
    assert status("/metrics", "guessed") == 401
    assert status("/metrics", secret) == (403 if role is Role.SUBMITTER else 200)
    assert status("/healthz") == 200


def test_a_token_leaves_this_machine_only_encrypted_or_when_told_to() -> None:
    with pytest.raises(CommandFault, match="the token would travel unencrypted") as fault:
        Client("coordinator.example.org:1", Credentials(token="secret"))
    assert fault.value.exit_code == ExitCode.USAGE
    for sound in (Credentials("secret", insecure=True), Credentials("secret", tls=True)):
        Client("coordinator.example.org:1", sound).__exit__()
    Client("127.0.0.1:1", Credentials("secret")).__exit__()
    assert "secret" not in repr(Credentials("secret", key=b"secret"))
