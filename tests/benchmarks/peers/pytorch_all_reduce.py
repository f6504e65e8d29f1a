"""PyTorch's all-reduce over gloo between two processes, alone: ELEMENTS... -> JSON, seconds by elements."""

import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

WARM_UP_CALLS, MOST_CALLS, SECONDS = 3, 200, 1.0


def run(rank: int, store: str, sizes: list[int]) -> None:
    """One of the two; as exchange_program.py measures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for elements in sizes:
        values = torch.ones(elements)
        times: list[float] = []
        number, spent = 0, 0.0
        while number < WARM_UP_CALLS + 1 or (spent < SECONDS and number < MOST_CALLS):
            number += 1
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number > WARM_UP_CALLS:
                times.append(float(taken))
                spent += float(taken)
        found[elements] = statistics.median(times)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "store")
        processes.spawn(run, (place, [int(word) for word in sys.argv[1:]]), nprocs=2)
