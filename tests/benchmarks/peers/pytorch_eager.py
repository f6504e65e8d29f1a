"""PyTorch, eager, one process, one thread: the training loop of its tutorials with the fast settings chosen."""

from collections.abc import Callable

import torch
from pytorch_model import has_convolutions, make_model
from stopwatch import Arguments, Stopwatch, load_arrays, peak_memory_bytes, print_result, read_arguments

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of features and targets


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Adam:
    """`fused` is PyTorch's fastest Adam on a CPU."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)


def load_tensors(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    """Features and targets as the model takes them, and the model."""
    features, targets = map(torch.from_numpy, load_arrays(arguments))
    model = make_model(arguments.model, tuple(features.shape[1:]))
    if has_convolutions(arguments.model):
        features = features.unsqueeze(1)  # one channel
    return features, targets, model


def loss_of(model: torch.nn.Module) -> Loss:
    """Cross-entropy, the mean over samples or over all positions of all samples."""

    def loss(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(features).flatten(0, -2), targets.flatten())

    return loss


def describe_version() -> str:
    """PyTorch's version and whose matrix products it runs."""
    return f"PyTorch {torch.__version__} with {'MKL' if torch.backends.mkl.is_available() else 'its own BLAS'}"


def train(arguments: Arguments, prepare: Callable[[Loss], Loss]) -> None:
    """Train and print the result; `prepare` may make something faster of the function from a batch to its loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, targets, model = load_tensors(arguments)
    optimizer = make_optimizer(model, arguments.learning_rate)
    batch_loss = prepare(loss_of(model))
    stopwatch = Stopwatch()
    for _ in range(arguments.epochs):
        for indices in torch.randperm(len(features)).split(arguments.batch_size):
            loss = batch_loss(features.index_select(0, indices), targets.index_select(0, indices))
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
    train(read_arguments(), prepare=lambda loss: loss)
