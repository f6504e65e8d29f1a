"""Small jobs for tests under mpirun: written, run to the end, and what they leave read and compared."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

# 203 samples in batches of 40, a fifth held out: four batches of 40 and a ragged one of 3, fewer than five ranks. 9
# epochs: 45 steps.
SAMPLES, BATCH, EPOCHS = 203, 40, 9
LEARNING_RATE = 0.03


def write_data(path: Path, noise: bool = False) -> Path:
    """20 features and four classes; with `noise` every other label is drawn, so that the validation loss soon rises."""
    random = np.random.default_rng(7)
    features = random.standard_normal((SAMPLES, 20)).astype(np.float32)
    targets = (features @ random.standard_normal((20, 4))).argmax(axis=1)
    if noise:
        targets[::2] = random.integers(0, 4, len(targets[::2]))
    np.savez(path, x=features, y=targets)
    return path


def write_job(
    folder: Path, data: Path, optimizer: str = "adam", sync: str = "all_reduce", training: dict | None = None, **parts
) -> Path:
    """`parts` take the place of the job's own; `training` is laid over it."""
    job = {
        "name": "toy",
        "data": {"train": {"npz": {"path": str(data)}}, "validation_fraction": 0.2},
        "model": [{"dense": {"units": 32}}, "relu", {"dense": {"units": 4}}],
        "loss": "softmax_cross_entropy",
        "optimizer": {optimizer: {"learning_rate": LEARNING_RATE}},
        "training": {"epochs": EPOCHS, "batch_size": BATCH, "seed": 3} | (training or {}),
        "sync": sync,
    }
    name = sync if isinstance(sync, str) else "-".join(map(str, [*sync, *next(iter(sync.values())).values()]))
    path = folder / f"{optimizer}-{name}.json"
    path.write_text(json.dumps(job | parts))
    return path


def train(run_ranks, ranks: int, job: Path, output: Path, *more: object) -> dict[str, np.ndarray]:
    """Run to a good end; the weights it leaves."""
    done = run_ranks(ranks, ["-m", "worker", "train", job, "-o", output, *more])
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(output / "model.safetensors")


def assert_close(result: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> None:
    """Within 1e-5 of each array's size."""
    assert result.keys() == reference.keys()
    for name, array in result.items():
        scale = np.abs(reference[name]).max()
        np.testing.assert_allclose(array, reference[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, line by line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    """summary.json."""
    return json.loads((folder / "summary.json").read_text())
