"""The layers of a job file as PyTorch modules.

Rules: a model with convolutions is channels-last, which took half the time of the default order here; attention is
scaled_dot_product_attention, PyTorch's fused one.
"""

from collections.abc import Callable
from typing import Any

import torch
from stopwatch import kind_and_options
from torch import nn

Shape = tuple[int, ...]  # of a sample as the job file counts it: channels last


class Flatten(nn.Module):
    """Rows with the channels innermost, as the images lie in memory: nothing is copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x.flatten(1)


class Positions(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, time, width = x.shape
        q, k, v = self.inward(x).view(n, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        gathered = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.outward(gathered.transpose(1, 2).reshape(n, time, width))


class Residual(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inside(x)


def _dense(options: dict[str, Any], shape: Shape) -> tuple[nn.Module, Shape]:
    linear = nn.Linear(torch.Size(shape).numel(), options["units"])
    return (linear if len(shape) == 1 else nn.Sequential(Flatten(), linear)), (options["units"],)


def _conv2d(options: dict[str, Any], shape: Shape) -> tuple[nn.Module, Shape]:
    height, width, channels = shape
    convolution = nn.Conv2d(channels, options["filters"], options["kernel"], padding=options["kernel"] // 2)
    return convolution, (height, width, options["filters"])


def _max_pool2d(options: dict[str, Any], shape: Shape) -> tuple[nn.Module, Shape]:
    height, width, channels = shape
    return nn.MaxPool2d(options["size"]), (height // options["size"], width // options["size"], channels)


def _attention(options: dict[str, Any], shape: Shape) -> tuple[nn.Module, Shape]:
    return SelfAttention(shape[-1], options.get("heads", 1), options.get("causal", False)), shape


def _residual(options: dict[str, Any], shape: Shape) -> tuple[nn.Module, Shape]:
    return Residual(make_layers(options["layers"], shape)), shape


# Each makes the module of a layer for samples of a shape, and says what shape comes out.
MODULES: dict[str, Callable[[dict[str, Any], Shape], tuple[nn.Module, Shape]]] = {
    "dense": _dense,
    "linear": lambda options, shape: (nn.Linear(shape[-1], options["units"]), (*shape[:-1], options["units"])),
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "embedding": lambda options, shape: (
        nn.Embedding(options["vocabulary"], options["units"]),
        (*shape, options["units"]),
    ),
    "positions": lambda _, shape: (Positions(shape), shape),
    "attention": _attention,
    "residual": _residual,
    "layer_norm": lambda _, shape: (nn.LayerNorm(shape[-1]), shape),
    "relu": lambda _, shape: (nn.ReLU(), shape),
    "gelu": lambda _, shape: (nn.GELU(), shape),
}


def make_layers(layers: list[Any], shape: Shape) -> nn.Sequential:
    modules: list[nn.Module] = []
    for kind, options in map(kind_and_options, layers):
        module, shape = MODULES[kind](options, shape)
        modules.append(module)
    return nn.Sequential(*modules)


def has_convolutions(layers: list[Any]) -> bool:
    return any(kind == "conv2d" for kind, _ in map(kind_and_options, layers))


def make_model(layers: list[Any], sample_shape: Shape) -> nn.Module:
    """The model; images of one channel are (height, width) in `sample_shape`."""
    if not has_convolutions(layers):
        return make_layers(layers, sample_shape)
    return make_layers(layers, (*sample_shape, 1)).to(memory_format=torch.channels_last)
