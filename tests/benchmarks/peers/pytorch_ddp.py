"""PyTorch DistributedDataParallel over gloo: two processes, one thread each, meeting over loopback.

This process is rank 0 and starts rank 1, which is itself with another RANK.
"""

import os
import subprocess
import sys

import torch
import torch.distributed
from pytorch_eager import load_tensors, make_model, make_optimizer
from stopwatch import Stopwatch, peak_memory_bytes, print_result, read_arguments

WORLD_SIZE = 2


def main(rank: int) -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=arguments.rendezvous.as_uri(), rank=rank, world_size=WORLD_SIZE
    )
    features, labels = load_tensors(arguments)
    # Gradients that live in the buckets are not copied; a graph that never changes need not be searched each step.
    model = torch.nn.parallel.DistributedDataParallel(
        make_model(arguments.units), gradient_as_bucket_view=True, static_graph=True
    )
    optimizer = make_optimizer(model, arguments.learning_rate)
    stopwatch = Stopwatch()
    for _ in range(arguments.epochs):
        order = torch.randperm(len(features))[rank::WORLD_SIZE]  # the same permutation on each rank: one seed
        for indices in order.split(arguments.batch_size):
            loss = torch.nn.functional.cross_entropy(
                model(features.index_select(0, indices)), labels.index_select(0, indices)
            )
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
            version=f"PyTorch {torch.__version__}",
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]))
    else:
        other = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": "1"})
        main(0)
        sys.exit(other.wait())
