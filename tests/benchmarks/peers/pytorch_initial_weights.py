"""Paceline's initial weights in PyTorch: He's normal in front of a rectifier, Glorot's uniform elsewhere, biases zero.

Rules: the distributions of worker/engine/initializers.py, not its numbers; a test holds the two against each other.
"""

import math
from typing import Any

import torch
from pytorch_model import Positions
from stopwatch import kind_and_options
from torch import nn

RECTIFIERS = ("relu", "gelu")
TRANSPARENT = ("max_pool2d",)  # what may stand between weights and their rectifier


@torch.no_grad()
def draw_weights(layers: list[Any], modules: nn.Sequential) -> None:
    """Write over the weights of the modules that pytorch_model made of `layers`."""
    named = [kind_and_options(layer) for layer in layers]
    for index, ((kind, options), module) in enumerate(zip(named, modules, strict=True)):
        if kind == "residual":
            draw_weights(options["layers"], module.inside)
            continue
        behind = next((follower for follower, _ in named[index + 1 :] if follower not in TRANSPARENT), "")
        for part in module.modules():
            _draw(part, kind, rectified=behind in RECTIFIERS)


def _draw(part: nn.Module, kind: str, rectified: bool) -> None:
    if isinstance(part, nn.Linear):
        # Attention's projection inward is three square matrices, each drawn as one by itself.
        _fill(part.weight, part.in_features, part.in_features if kind == "attention" else part.out_features, rectified)
    elif isinstance(part, nn.Conv2d):
        area = math.prod(part.kernel_size)
        _fill(part.weight, area * part.in_channels, area * part.out_channels, rectified)
    elif isinstance(part, nn.Embedding | Positions):
        _fill(part.weight, 1, part.weight.shape[-1], rectified)  # one row of the many feeds an output
    if isinstance(part, nn.Linear | nn.Conv2d):
        part.bias.zero_()


def _fill(weight: torch.Tensor, fan_in: int, fan_out: int, rectified: bool) -> None:
    if rectified:
        weight.normal_(0.0, math.sqrt(2 / fan_in))
    else:
        limit = math.sqrt(6 / (fan_in + fan_out))
        weight.uniform_(-limit, limit)
