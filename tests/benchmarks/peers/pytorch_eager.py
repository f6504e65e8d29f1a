"""PyTorch, eager, one process, one thread: the training loop of its tutorials with the fast settings chosen."""

import itertools

import torch
from stopwatch import Arguments, Stopwatch, load_arrays, peak_memory_bytes, print_result, read_arguments


def make_model(units: tuple[int, ...]) -> torch.nn.Sequential:
    """Dense layers with a ReLU between each two."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(units):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Adam:
    """`fused` is PyTorch's fastest Adam on a CPU."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)


def load_tensors(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = load_arrays(arguments)
    return torch.from_numpy(features), torch.from_numpy(labels)


def describe_version() -> str:
    """PyTorch's version and whose matrix products it runs."""
    return f"PyTorch {torch.__version__} with {'MKL' if torch.backends.mkl.is_available() else 'its own BLAS'}"


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, labels = load_tensors(arguments)
    model = make_model(arguments.units)
    optimizer = make_optimizer(model, arguments.learning_rate)
    stopwatch = Stopwatch()
    for _ in range(arguments.epochs):
        for indices in torch.randperm(len(features)).split(arguments.batch_size):
            loss = torch.nn.functional.cross_entropy(
                model(features.index_select(0, indices)), labels.index_select(0, indices)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stopwatch.step_done()
        stopwatch.epoch_done(len(features))
    print_result(
        stopwatch,
        peak_memory_bytes=peak_memory_bytes(),
        train_loss=float(loss.detach()),
        version=describe_version(),
    )


if __name__ == "__main__":
    main()
