"""The wheel: it builds from a clean copy, installs, holds what it must and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = ("protos", "worker", "coordinator")


def run(*argv: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without an index, from a copy that holds no stubs: the build must make them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("*_pb2*", "__pycache__"))
    built = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", built, cwd=copy)
    (path,) = built.glob("paceline-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="session")
def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel and borrows everything else from the present one.

    The present one's editable install is not seen there: a .pth file inside a folder named by a .pth file is not read.
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    return home / "bin"


def test_the_wheel_holds_the_three_packages_and_nothing_else(members: set[str]) -> None:
    assert {name.split("/")[0] for name in members if ".dist-info/" not in name} == set(PACKAGES)


def test_the_wheel_holds_the_stubs_of_every_proto_file(members: set[str]) -> None:
    protos = [path.stem for path in (PROJECT / "protos").glob("*.proto")]
    assert protos
    for stem in protos:
        wanted = {f"protos/{stem}{end}" for end in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py")}
        assert wanted <= members


def test_each_package_says_that_it_is_typed(members: set[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= members


def test_the_digits_come_with_their_licence_and_source(members: set[str]) -> None:
    assert {"worker/data/built_in/digits.npz", "worker/data/built_in/digits.txt"} <= members


def test_every_source_file_is_in_the_wheel(members: set[str]) -> None:
    sources = {str(path.relative_to(PROJECT)) for package in PACKAGES for path in (PROJECT / package).rglob("*.py")}
    assert sources <= members


def test_the_licence_is_in_the_wheel(members: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in members)


def test_the_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = "import protos.job_file, worker, coordinator; print(protos.__file__, worker.__file__, coordinator.__file__)"
    places = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(places) == len(PACKAGES)
    for place in places:
        assert Path(place).is_relative_to(installed.parent)


def test_the_installed_package_reads_a_job_file(installed: Path, tmp_path: Path) -> None:
    job = PROJECT / "examples" / "digits.yaml"
    code = "import sys, pathlib, protos.job_file as j; print(j.read_job_file(pathlib.Path(sys.argv[1])).name)"
    assert run(installed / "python", "-c", code, job, cwd=tmp_path) == "digits\n"


@pytest.mark.parametrize("program", ["paceline", "paceline-worker"])
def test_both_programs_start_from_the_installed_wheel(installed: Path, program: str, tmp_path: Path) -> None:
    # A folder named like a package, where one works, must not shadow it.
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "__init__.py").write_text("raise SystemExit('the wrong worker')\n")
    assert "usage" in run(installed / program, "--help", cwd=tmp_path).lower()
