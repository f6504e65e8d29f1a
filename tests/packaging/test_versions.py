"""Version numbers that must agree: the compiler's, and what the stubs it generates ask of the runtime."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
DEPENDENCIES = SETTINGS["project"]["dependencies"]
COMPILER = next(line for line in SETTINGS["build-system"]["requires"] if line.startswith("grpcio-tools"))


def lower_bound(name: str) -> str:
    (line,) = (line for line in DEPENDENCIES if re.match(rf"{name}[^\w-]", line))
    bound = re.search(r">=([\d.]+)", line)
    assert bound
    return bound[1]


@pytest.mark.parametrize("stub", sorted(path.name for path in (PROJECT / "protos").glob("*_pb2.py")))
def test_protobuf_is_at_least_what_the_stubs_ask_for(stub: str) -> None:
    asked = re.search(r"^# Protobuf Python Version: ([\d.]+)$", (PROJECT / "protos" / stub).read_text(), re.MULTILINE)
    assert asked
    assert lower_bound("protobuf") == asked[1]


@pytest.mark.parametrize("stub", sorted(path.name for path in (PROJECT / "protos").glob("*_pb2_grpc.py")))
def test_grpcio_is_at_least_what_the_stubs_ask_for(stub: str) -> None:
    asked = re.search(r"^GRPC_GENERATED_VERSION = '([\d.]+)'$", (PROJECT / "protos" / stub).read_text(), re.MULTILINE)
    assert asked
    assert lower_bound("grpcio") == asked[1]


def test_grpcio_and_its_companions_move_together() -> None:
    companions = [re.match(r"[\w-]+", line)[0] for line in DEPENDENCIES if line.startswith("grpcio")]  # type: ignore[index]
    assert len({lower_bound(name) for name in companions}) == 1


def test_tests_build_with_the_compiler_that_installs_do() -> None:
    assert COMPILER in SETTINGS["dependency-groups"]["test"]
