"""A whole job of Paceline done in PyTorch DDP over gloo: `pytorch_job.py JOB.json SCRATCH`.

Like `paceline run` it reads the data, trains, evaluates and saves weights and optimizer state after each epoch. The
layers, batch size, learning rate, epochs and seed are those of the job file. The rate is Paceline's: evaluation and
saving are left out, and so is the first epoch, or the first steps where there is no other.
"""

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed
from pytorch_ddp import WORLD_SIZE, distribute, launch, leave, meet
from pytorch_eager import describe_version, loss_of, make_optimizer
from pytorch_initial_weights import draw_weights
from pytorch_model import has_convolutions, make_model
from stopwatch import cut_text

IDX_HEADER = {"images": 16, "labels": 8}  # bytes
WARM_UP_STEPS = 10  # of a single epoch; half of it at most


def read_source(source: dict[str, Any], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (n, 28, 28), scaled, with labels int64 (n,); of a text both are int64 (n, context)."""
    if "text" in source:
        return cut_text(Path(source["text"]["path"]), source["text"]["context"])
    images, labels = (
        np.frombuffer(gzip.decompress(Path(source["idx"][name]).read_bytes()), np.uint8, offset=offset)
        for name, offset in IDX_HEADER.items()
    )
    return images.reshape(len(labels), 28, 28) * np.float32(scale), labels.astype(np.int64)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, features: torch.Tensor, targets: torch.Tensor, batch_size: int
) -> tuple[float, float]:
    """(mean loss, accuracy) over all ranks, of which this one has its own samples."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(features.split(batch_size), targets.split(batch_size), strict=True):
        logits, labels = model(x).flatten(0, -2), y.flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(-1) == labels).sum(), torch.tensor(len(labels))])
    torch.distributed.all_reduce(sums)
    loss_sum, right, count = sums.tolist()
    return loss_sum / count, right / count


def steady_rate(seconds: list[float], samples: list[int], epochs: int) -> float:
    """Samples a second of the steps that count, from what each step took and went over."""
    steps = len(seconds) // epochs
    warm_up = steps if epochs > 1 else min(WARM_UP_STEPS, steps // 2)
    return sum(samples[warm_up:]) / sum(seconds[warm_up:])


def main(rank: int) -> NoReturn:
    job, scratch = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    data, training, layers = job["data"], job["training"], job["model"]
    torch.set_num_threads(1)
    torch.manual_seed(training["seed"])
    meet(scratch, rank)
    (features, targets), (held_features, held_targets) = (
        [torch.from_numpy(array) for array in read_source(data[name], data.get("scale", 1.0))]
        for name in ("train", "validation")
    )
    held_features, held_targets = held_features[rank::WORLD_SIZE], held_targets[rank::WORLD_SIZE]
    bare = make_model(layers, tuple(features.shape[1:]))
    draw_weights(layers, bare)
    if has_convolutions(layers):
        features, held_features = features.unsqueeze(1), held_features.unsqueeze(1)  # one channel
    model = distribute(bare)
    optimizer = make_optimizer(model, job["optimizer"]["adam"]["learning_rate"])
    batch_loss = loss_of(model)
    seconds, samples = [], []
    for _ in range(training["epochs"]):
        began = time.perf_counter()
        order = torch.randperm(len(features))[rank::WORLD_SIZE]  # the same permutation on each rank: one seed
        for indices in order.split(training["batch_size"] // WORLD_SIZE):
            loss = batch_loss(features.index_select(0, indices), targets.index_select(0, indices))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ended = time.perf_counter()
            seconds.append(ended - began)
            samples.append(WORLD_SIZE * len(indices))
            began = ended
        validation_loss, accuracy = evaluate(bare, held_features, held_targets, training["batch_size"])
        if rank == 0:
            torch.save({"model": bare.state_dict(), "optimizer": optimizer.state_dict()}, scratch / "checkpoint.pt")
    if rank == 0:
        result = {
            "validation_loss": validation_loss,
            "validation_accuracy": accuracy,
            "samples_per_second": steady_rate(seconds, samples, training["epochs"]),
            "version": describe_version(),
        }
        print(json.dumps(result), flush=True)
    leave()


if __name__ == "__main__":
    launch(main)
