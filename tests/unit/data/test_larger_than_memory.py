"""Training from files that are larger than the memory a process may have of its own (RLIMIT_DATA)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from protos.job_file import parse_job
from worker.data.stored_array import BLOCK_BYTES
from worker.preparation import prepare

MEGABYTE = 1 << 20
ALLOWED_BYTES = 48 * MEGABYTE  # beyond what the process holds when everything is imported
FILE_BYTES = 256 * MEGABYTE
LEARNS = {"loss": "softmax_cross_entropy", "optimizer": "sgd"}

# One rank's part of a training run, without MPI: open, check, hold out, standardize, an epoch of gradients.
EPOCH = """
import json, resource, sys
import numpy as np
from protos.job_file import parse_job
from worker.accumulation import Accumulator
from worker.data.batches import BatchReader
from worker.data.sharding import sample_order
from worker.engine.layers.layer import Moment
from worker.errors import DataFault
from worker.measurements import Meter
from worker.preparation import prepare

job = parse_job(sys.argv[1])
status = open("/proc/self/status").read()
held_bytes = int(status.partition("VmData:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held_bytes + int(sys.argv[2]),) * 2)
try:
    prepared = prepare(job)
except DataFault as fault:
    sys.exit(f"error: {fault}")
model, samples = prepared.model, len(prepared.train)
parameters, gradient = np.zeros((2, model.parameter_count), np.float32)
model.attach(parameters, gradient)
accumulator = Accumulator(model, gradient, 4, 0)
reader = BatchReader(prepared.train, prepared.preprocessing, 4, augmentation=prepared.augmentation)
model.reserve(4)
order = sample_order(0, 0, samples)
seen = 0
for first in range(0, samples, 4):
    indices = order[first : first + 4]
    seen += accumulator.compute(reader, indices, order[:0], Moment(0, 1, 0), Meter()).samples
print(seen)
"""


def epoch(job: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    job = LEARNS | job
    return subprocess.run(
        [sys.executable, "-c", EPOCH, json.dumps(job), str(ALLOWED_BYTES)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[3],
        env={"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        check=False,
    )


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    np.save(tmp_path / "y.npy", np.arange(4096) % 3)
    return tmp_path / "y.npy"


@pytest.mark.parametrize(
    ("stored", "shape", "data"),
    [
        ("u1", (4096, 128, 128, 4), {"augment": {"flip": "horizontal", "crop": 4}}),
        ("f4", (4096, 16384), {"standardize": True}),
        ("f8", (4096, 8192), {"standardize": True, "validation_fraction": 0.25}),
    ],
)
def test_an_npy_file_streams(
    tmp_path: Path, labels: Path, stored: str, shape: tuple[int, ...], data: dict[str, Any]
) -> None:
    features = open_memmap(tmp_path / "x.npy", "w+", stored, shape)  # a sparse file: only what is written is on disk
    features[::1000] = 1
    assert features.nbytes == FILE_BYTES > 5 * ALLOWED_BYTES
    del features
    train = {"npy": {"features": str(tmp_path / "x.npy"), "targets": str(labels)}}
    done = epoch({"data": {"train": train} | data, "model": [{"dense": {"units": 3}}]})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4096 - round(4096 * data.get("validation_fraction", 0))


@pytest.mark.parametrize(
    ("data", "passes"), [({}, 1), ({"standardize": True}, 2), ({"standardize": True, "validation_fraction": 0.01}, 2)]
)
def test_who_watches_is_told_of_every_few_megabytes_of_each_pass(
    tmp_path: Path, labels: Path, data: dict[str, Any], passes: int
) -> None:
    """Else a set that takes longer to open than limits.stall_seconds would end as a rank that is stuck."""
    open_memmap(tmp_path / "x.npy", "w+", np.float32, (4096, 4096)).flush()  # 64 MB
    train = {"npy": {"features": str(tmp_path / "x.npy"), "targets": str(labels)}}
    job = {"data": {"train": train} | data, "model": [{"dense": {"units": 3}}]}
    told: list[int] = []
    prepared = prepare(parse_job(json.dumps(job | LEARNS)), lambda: told.append(1))
    assert prepared.maps_data
    blocks = prepared.train.features.nbytes // BLOCK_BYTES
    assert passes * blocks * 0.99 <= len(told) <= 2 * passes * blocks + 1


def test_a_text_streams(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(FILE_BYTES)
    model = [{"embedding": {"vocabulary": 256, "units": 1}}, {"linear": {"units": 256}}]
    source = {"text": {"path": str(tmp_path / "large.txt"), "context": 1024}}
    done = epoch({"data": {"train": source, "validation_fraction": 0.999}, "model": model})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_an_archive_that_does_not_fit_in_memory_is_one_line(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "xy.npz", x=np.zeros((4096, 16 * 1024), np.uint8), y=np.arange(4096) % 3)
    source = {"npz": {"path": str(tmp_path / "xy.npz")}}
    done = epoch({"data": {"train": source}, "model": [{"dense": {"units": 3}}]})
    assert done.returncode == 1
    assert done.stderr.startswith("error: data source npz: does not fit in memory")
    assert "store it as npy, which is memory-mapped" in done.stderr
