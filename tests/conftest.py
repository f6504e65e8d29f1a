"""For every test: a PostgreSQL server of their own, where Debian's package is installed; Hypothesis without a clock."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Its limit of 200 ms an example says something of the machine and nothing of the code.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

START_SECONDS = 60  # on a busy machine


def program(name: str) -> str | None:
    """Debian puts the server's programs beside no other."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(found[-1]) if found else shutil.which(name)


class Postgres:
    """A cluster in a folder, on a unix socket there. It refuses to run as root, so root runs it as `postgres`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as_user:
            shutil.chown(folder, "postgres", "postgres")
        options = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")
        self._run("initdb", "-D", str(folder / "data"), *options)

    def start(self) -> None:
        # fsync is PostgreSQL's own business: what is tested here is what a coordinator asks of it.
        options = ("-c", "listen_addresses=", "-k", str(self.folder), "-c", "fsync=off", "-c", "max_connections=60")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", str(self.folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._as_user,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if subprocess.run([program("pg_isready"), "-q", "-h", str(self.folder)], check=False).returncode == 0:
                return
            assert self._process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError(f"PostgreSQL did not start in {START_SECONDS} s: {(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        """Ends every session, as a restart of the server does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_SECONDS)
            self._process = None

    def new_database(self) -> str:
        """An empty one; its URL as `paceline serve --store` takes it."""
        name = f"test_{next(self._numbers)}"
        self.query("postgres", f"CREATE DATABASE {name}")
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def query(self, database: str, text: str) -> str:
        arguments = ("-h", str(self.folder), "-U", "postgres", "-d", database, "-v", "ON_ERROR_STOP=1", "-qAt", "-c")
        return self._run("psql", *arguments, text)

    def _run(self, name: str, *arguments: str) -> str:
        command = [program(name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, **self._as_user)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="pip install 'paceline[postgres]'")
    if not all(map(program, ("initdb", "postgres", "psql", "pg_isready"))):
        pytest.skip("needs Debian's PostgreSQL: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="paceline-postgres-") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
