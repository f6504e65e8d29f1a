"""What goes wrong is one short message on standard error and the right exit code, never a bare traceback."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from coordinator.__main__ import main
from protos.exit_codes import ExitCode

CLIENT_VERBS = (["list"], ["get", "x"], ["watch", "x"], ["logs", "x"], ["metrics", "x"], ["cancel", "x"], ["pull", "x"])

FIVE_FAULTS = """\
name: bad
data: {train: {built_in: digits}, validation_fraction: 2}
model: [dense: {units: 0}]
loss: softmax
optimizer: {adam: {learning_rate: -1}}
training: {epochs: 0}
"""


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers, nobody else gets it
        yield taken.getsockname()[1]


@pytest.mark.parametrize("verb", CLIENT_VERBS, ids=lambda verb: verb[0])
def test_an_absent_coordinator_is_one_line_and_3(paceline, verb, closed_port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = paceline(*verb, "--server", f"127.0.0.1:{closed_port}")
    assert done == (
        ExitCode.UNREACHABLE,
        "",
        f"error: no coordinator answers at 127.0.0.1:{closed_port}: "
        "start one with `paceline serve`, or name another with --server\n",
    )


@pytest.mark.parametrize("verb", ["run", "submit"])
def test_a_job_file_with_five_faults_prints_five_lines(paceline, tmp_path, verb):
    path = tmp_path / "bad.yaml"
    path.write_text(FIVE_FAULTS)
    done = paceline(verb, str(path))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    lines = done.err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: ") for line in lines)
    assert "error: optimizer.adam.learning_rate: -1 is not above 0" in lines


def test_the_coordinators_violations_are_a_line_each(ask, refuse, job_file):
    refuse(
        grpc.StatusCode.INVALID_ARGUMENT,
        "both at once",
        ("workers", "8 is more than 2"),
        ("data.train.npz", "is outside"),
    )
    done = ask("submit", str(job_file))
    assert (done.code, done.err) == (
        ExitCode.USAGE,
        "error: workers: 8 is more than 2\nerror: data.train.npz: is outside\n",
    )


def test_data_the_coordinator_may_not_read_is_not_allowed_and_named_at_its_place(ask, refuse, job_file):
    refuse(
        grpc.StatusCode.PERMISSION_DENIED, "not there", ("data.train.npz.path", "'/etc/passwd' is not under a folder")
    )
    done = ask("submit", str(job_file))
    words = "error: data.train.npz.path: '/etc/passwd' is not under a folder\n"
    assert (done.code, done.err) == (ExitCode.NOT_ALLOWED, words)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, ExitCode.FAILED),
        (grpc.StatusCode.FAILED_PRECONDITION, ExitCode.FAILED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ExitCode.FAILED),
        (grpc.StatusCode.INTERNAL, ExitCode.FAILED),
        (grpc.StatusCode.PERMISSION_DENIED, ExitCode.NOT_ALLOWED),
        (grpc.StatusCode.UNAUTHENTICATED, ExitCode.NOT_ALLOWED),
        (grpc.StatusCode.INVALID_ARGUMENT, ExitCode.USAGE),
        (grpc.StatusCode.UNAVAILABLE, ExitCode.UNREACHABLE),  # it answers, and says that it is stopping
    ],
    ids=lambda value: value.name,
)
@pytest.mark.parametrize("verb", CLIENT_VERBS, ids=lambda verb: verb[0])
def test_the_coordinators_own_words_are_printed_with_the_codes_exit_code(
    ask, refuse, verb, code, exit_code, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refuse(code, "this is why")
    assert ask(*verb) == (exit_code, "", "error: this is why\n")
    assert list(tmp_path.rglob("*")) == []


def test_a_server_that_is_no_coordinator_is_named(paceline):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    done = paceline("list", "--server", f"127.0.0.1:{port}")
    server.stop(0).wait()
    assert (done.code, done.err) == (
        1,
        f"error: what answers at 127.0.0.1:{port} is no Paceline coordinator, or one of another version\n",
    )


def test_a_coordinator_that_never_answers_is_given_up(paceline, monkeypatch):
    monkeypatch.setattr("coordinator.client.CALL_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = paceline("list", "--server", f"127.0.0.1:{silent.getsockname()[1]}")
    assert done.code == ExitCode.UNREACHABLE
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":50051", "host:port", "host:99999", "::1:50051"])
def test_an_address_that_is_none_is_bad_usage(paceline, address):
    done = paceline("list", "--server", address)
    assert done.code == ExitCode.USAGE
    assert "is not HOST:PORT" in done.err


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["list", "--nonsense"], ["get"], ["run", "a.yaml", "-n", "0"], ["list", "--format", "xml"]],
)
def test_bad_usage_is_2_and_names_the_fault(paceline, arguments):
    done = paceline(*arguments)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert "Error: " in done.err


@pytest.mark.parametrize("verb", ["doctor"])
def test_a_verb_that_is_not_there_yet_is_not_pretended(paceline, verb):
    assert paceline(verb, "x").code == ExitCode.USAGE


def test_a_missing_job_file_is_named(paceline, tmp_path):
    done = paceline("submit", str(tmp_path / "none.yaml"))
    assert (done.code, done.err) == (2, f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory\n")


def test_our_own_mistake_says_its_name_and_where_to_look(paceline, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("coordinator.client.Client.get", broken)
    done = paceline("get", "x")
    assert (done.code, done.err) == (
        1,
        "error: internal error: ZeroDivisionError: division by zero; "
        "set PACELINE_DEBUG=1 to see where, and please report it\n",
    )
    monkeypatch.setenv("PACELINE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["paceline", "get", "x"])
    with pytest.raises(ZeroDivisionError):
        main()


# ---------------------------------------------------------------------------------------------------------------- pull


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "a/../../escape", ""])
def test_a_path_that_leaves_the_folder_is_refused_and_nothing_is_left(ask, coordinator, cut, tmp_path, path):
    coordinator.pieces = list(cut({"fine": b"1", path: b"2"}))
    done = ask("pull", "x", "-o", str(tmp_path / "output"))
    assert done.code == 1
    assert "outside the folder" in done.err
    assert list(tmp_path.rglob("*")) == []


def test_a_damaged_file_is_refused_and_nothing_is_left(ask, coordinator, cut, tmp_path):
    coordinator.pieces = list(cut({"fine": b"1", "model": b"x" * 2500}))
    coordinator.pieces[2].data = b"y" * 1000
    done = ask("pull", "x", "-o", str(tmp_path / "output"))
    assert (done.code, done.err) == (1, "error: model arrived damaged: its SHA-256 does not agree; pull again\n")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("lost", [1, 2, 3], ids=["first piece", "middle piece", "last piece"])
def test_a_lost_piece_is_noticed(ask, coordinator, cut, tmp_path, lost):
    coordinator.pieces = list(cut({"a": b"1", "model": b"x" * 2500}))
    del coordinator.pieces[lost]
    done = ask("pull", "x", "-o", str(tmp_path / "output"))
    assert done.code == 1
    assert "pull again" in done.err
    assert list(tmp_path.rglob("*")) == []


def test_an_output_folder_that_holds_something_is_left_alone(ask, coordinator, tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = ask("pull", "x", "-o", str(tmp_path))
    assert (done.code, coordinator.requests) == (2, [])
    assert done.err == f"error: {tmp_path} is already there; name another folder with -o\n"
