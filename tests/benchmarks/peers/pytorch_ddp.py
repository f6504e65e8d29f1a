"""PyTorch DistributedDataParallel over gloo: two processes, or WORLD_SIZE, of one thread each, meeting over loopback.

This process is rank 0 and starts the others, which are itself with another RANK.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed
from pytorch_eager import describe_version, load_tensors, loss_of, make_optimizer
from stopwatch import Stopwatch, peak_memory_bytes, print_result, read_arguments

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "2"))
TIMEOUT = timedelta(seconds=60)  # for all to meet, and for one exchange


def meet(scratch: Path, rank: int) -> None:
    """Find the other ranks by a file in `scratch`."""
    meeting_place = (scratch / "rendezvous").absolute().as_uri()
    torch.distributed.init_process_group("gloo", meeting_place, TIMEOUT, rank=rank, world_size=WORLD_SIZE)


def distribute(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with rank 0's weights on each rank and gradients averaged.

    Gradients that live in the buckets are not copied; a graph that never changes need not be searched each step.
    """
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)


def leave() -> NoReturn:
    """An orderly end aborts about one time in ten ("terminate called without an active exception"): gloo's threads."""
    torch.distributed.barrier()
    os._exit(0)


def launch(main: Callable[[int], NoReturn]) -> NoReturn:
    """Start the other ranks and be rank 0, or be the rank that was started."""
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]))
    for rank in range(1, WORLD_SIZE):
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": str(rank)})
    main(0)


def main(rank: int) -> NoReturn:
    arguments = read_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meet(arguments.scratch, rank)
    features, targets, model = load_tensors(arguments)
    model = distribute(model)
    optimizer = make_optimizer(model, arguments.learning_rate)
    batch_loss = loss_of(model)
    stopwatch = Stopwatch()
    for _ in range(arguments.epochs):
        order = torch.randperm(len(features))[rank::WORLD_SIZE]  # the same permutation on each rank: one seed
        for indices in order.split(arguments.batch_size):
            loss = batch_loss(features.index_select(0, indices), targets.index_select(0, indices))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stopwatch.step_done()
        stopwatch.epoch_done(len(features))
    largest = torch.tensor([peak_memory_bytes()])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    if rank == 0:
        print_result(
            stopwatch,
            peak_memory_bytes=int(largest.item()),
            train_loss=float(loss.detach()),
            version=describe_version(),
        )
    leave()


if __name__ == "__main__":
    launch(main)
