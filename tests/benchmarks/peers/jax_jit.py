"""JAX, the whole step in one jit: gathering the batch, gradient and Adam, its buffers donated; one thread a device.

Rules: XLA gets a thread a device; a run that takes more is refused by the benchmark.
"""

import os
from collections.abc import Callable
from typing import Any

from stopwatch import Stopwatch, load_arrays, peak_memory_bytes, print_result, read_arguments

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def main(devices: int = 1) -> None:
    flags = f"--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The size of XLA's pool, else a thread for each core. One device gets one; several that wait there for each other's
    # sums need more, or nobody is left to compute them.
    os.environ["NPROC"] = "1" if devices == 1 else str(2 * devices)
    if devices == 1:
        # Else the interpreter hands the next step over on another core while XLA computes: 1.3 cores on a small one.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    train(devices)


def make_step(apply: Callable[..., Any], learning_rate: float) -> Callable[..., Any]:
    """(state, features, targets, order, number) -> (state, loss), compiled once; batch `number` is a row of `order`."""
    import jax
    import jax.numpy as jnp
    from jax_model import cross_entropy

    def step(state: Any, features: Any, targets: Any, order: Any, number: Any) -> tuple[Any, Any]:
        weights, first, second, count = state
        indices = order[number]

        def loss_of(w: Any) -> Any:
            return cross_entropy(apply(w, features[indices]), targets[indices])

        loss, gradient = jax.value_and_grad(loss_of)(weights)
        count += 1
        rate = learning_rate * jnp.sqrt(1 - BETA2**count) / (1 - BETA1**count)
        first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, gradient)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, gradient)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + EPSILON), weights, first, second)
        return (weights, first, second, count), loss

    return jax.jit(step, donate_argnums=0)


def train(devices: int) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jax_model import make_layers

    arguments = read_arguments()
    random = np.random.default_rng(0)
    features, targets = load_arrays(arguments)
    samples, sample_shape = len(features), features.shape[1:]
    if any("conv2d" in layer for layer in arguments.model):
        features, sample_shape = features[..., np.newaxis], (*sample_shape, 1)
    weights, apply = make_layers(random, arguments.model, sample_shape)
    zeros = [jax.tree.map(np.zeros_like, weights) for _ in range(2)]
    # Weights and data lie on every device; each gathers the samples of its own part of a batch.
    mesh = Mesh(np.array(jax.devices()[:devices]), ("rank",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "rank"))
    state = jax.device_put((weights, *zeros, np.float32(0)), everywhere)
    # Whole numbers of 32 bits, as JAX has them.
    stored = [array.astype(np.int32) if array.dtype == np.int64 else array for array in (features, targets)]
    features, targets = jax.device_put(stored, everywhere)
    step = make_step(apply, arguments.learning_rate)

    stopwatch = Stopwatch()
    batch_size = arguments.batch_size * devices
    for epoch in range(arguments.epochs):
        order = random.permutation(samples).astype(np.int32).reshape(-1, batch_size)
        order = jax.device_put(order, split)
        for number in range(len(order)):
            state, loss = step(state, features, targets, order, number)
            if epoch == number == 0:
                jax.block_until_ready((state, loss))
                stopwatch.step_done()
        jax.block_until_ready((state, loss))
        stopwatch.epoch_done(samples)
    print_result(
        stopwatch,
        peak_memory_bytes=peak_memory_bytes(),
        train_loss=float(loss),
        version=f"JAX {jax.__version__}",
        devices=devices,
    )


if __name__ == "__main__":
    main()
