"""The networks that are timed: the three of the design's tables, a convolutional network and a small transformer.

Rules: a model stands here once, in the words of a job file; ours and every peer build what is written. All train with
Adam and softmax cross-entropy.
"""

from typing import Any, NamedTuple

LEARNING_RATE = 0.001
CONTEXT = 128  # bytes in a sample of text


class Case(NamedTuple):
    """One network and how it is fed."""

    name: str
    kind: str  # mlp, cnn or transformer
    network: str  # for people
    model: tuple[Any, ...]  # layers as in a job file
    batch_size: int  # samples a rank takes in a step: two ranks take twice as many together
    samples: int  # in an epoch; a multiple of every global batch, so that no step is ragged

    @property
    def title(self) -> str:
        return f"{self.network}, batch {self.batch_size} a rank"

    @property
    def of_text(self) -> bool:
        """Fed with bytes and not with images."""
        return self.kind == "transformer"

    @property
    def classes(self) -> int:
        """What the last layer puts out."""
        (options,) = self.model[-1].values()
        return int(options["units"])

    def shortened(self) -> "Case":
        """The same with an epoch of at most eight steps of two ranks, as many as the CNN needs to learn something."""
        return self._replace(samples=min(self.samples, 16 * self.batch_size))


def mlp(name: str, units: tuple[int, ...], batch_size: int, samples: int) -> Case:
    """Dense layers of `units` (features, hidden layers, classes), ReLU between each two."""
    layers: list[Any] = []
    for outputs in units[1:]:
        layers += [{"dense": {"units": outputs}}, "relu"]
    return Case(name, "mlp", "-".join(map(str, units)), tuple(layers[:-1]), batch_size, samples)


def cnn(name: str, batch_size: int, samples: int) -> Case:
    """examples/fashion_mnist_cnn.yaml. ReLU stands behind the pooling: the same result, and quicker for everyone."""
    layers: list[Any] = []
    for filters in (32, 64):
        layers += [
            {"conv2d": {"filters": filters, "kernel": 3, "padding": "same"}},
            {"max_pool2d": {"size": 2}},
            "relu",
        ]
    layers += [{"dense": {"units": 128}}, "relu", {"dense": {"units": 10}}]
    return Case(name, "cnn", "CNN of 32 and 64 filters 3x3", tuple(layers), batch_size, samples)


def transformer(name: str, blocks: int, width: int, heads: int, batch_size: int, samples: int) -> Case:
    """A causal language model of bytes, normalized before each block (Radford et al. 2019)."""
    attend = ["layer_norm", {"attention": {"heads": heads, "causal": True}}]
    think = ["layer_norm", {"linear": {"units": 4 * width}}, "gelu", {"linear": {"units": width}}]
    block = [{"residual": {"layers": attend}}, {"residual": {"layers": think}}]
    layers = [{"embedding": {"vocabulary": 256, "units": width}}, "positions", *(blocks * block)]
    layers += ["layer_norm", {"linear": {"units": 256}}]
    network = f"transformer, {blocks} layers of width {width}, context {CONTEXT}"
    return Case(name, "transformer", network, tuple(layers), batch_size, samples)


CASES = (
    mlp("small", (784, 128, 10), 32, 16_384),
    mlp("medium", (784, 512, 256, 10), 128, 16_384),
    mlp("large", (784, 2048, 2048, 10), 256, 4_096),
    cnn("cnn", 64, 2_048),
    transformer("transformer", 4, 128, 4, 16, 128),
)
