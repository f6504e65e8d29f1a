"""The embedding layer: a trained row of numbers for each token.

Rules: tokens arrive as the floats every feature is, and must be whole numbers within the vocabulary: DataFault says
which is not. The layer is the first of a model, for nothing can pass a gradient on to whole numbers.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from protos import job_pb2
from worker.engine.layers.layer import Takes, Traits
from worker.engine.params import FloatArray, Parameter, Shape
from worker.errors import DataFault, ModelFault


class Embedding:
    """y = W[token], which is e W with the row e that is 1 at the token and 0 elsewhere."""

    traits: ClassVar[Traits] = Traits(Takes.TOKENS)
    reads_output: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    def __init__(self, options: job_pb2.EmbeddingLayer, input_shape: Shape) -> None:
        """ModelFault when there are no tokens, no vocabulary or no units."""
        self.vocabulary, self.units = options.vocabulary, options.units
        for name, value in (("vocabulary", self.vocabulary), ("units", self.units)):
            if value < 1:
                raise ModelFault(f"{name}: {value} is not at least 1")
        self.tokens_per_sample = math.prod(input_shape)
        if self.tokens_per_sample < 1:
            raise ModelFault(f"got samples of shape {input_shape}, which hold no values; needs at least one")
        self.output_shape: Shape = (*input_shape, self.units)
        # One of the inputs is 1 at a time, all others are 0: one input feeds an output.
        self.parameters: tuple[Parameter, ...] = (
            Parameter("weight", (self.vocabulary, self.units), fan_in=1, fan_out=self.units),
        )

    def attach(self, values: Sequence[FloatArray], gradients: Sequence[FloatArray]) -> None:
        """Take views: weight (vocabulary, units) and its gradient."""
        (self.weight,) = values
        if gradients:
            (self.d_weight,) = gradients

    def reserve(self, batch_size: int, dtype: npt.DTypeLike, in_place: bool) -> None:
        """The tokens as indices, the output, and room to put the gradient's rows in order of their tokens."""
        tokens = batch_size * self.tokens_per_sample
        self.indices = np.empty(tokens, np.intp)
        self.y = np.empty((batch_size, *self.output_shape), dtype)
        self.sorted_rows = np.empty((tokens, self.units), dtype)

    def forward(self, x: FloatArray) -> FloatArray:
        """Rows of the weight: x (n, ...) -> (n, ..., units). DataFault when something in x is not a token."""
        flat = x.reshape(-1)
        self.tokens = self.indices[: len(flat)]
        # The bounds first: what does not fit an integer must not be made one.
        if not self._within(x):
            self._refuse(x)
        np.copyto(self.tokens, flat, casting="unsafe")
        if not np.array_equal(self.tokens, flat):
            self._refuse(x)
        y = self.y[: len(x)]
        # The indices are known to be good, and "wrap" spares the copy that checking them would make.
        np.take(self.weight, self.tokens, axis=0, out=y.reshape(-1, self.units), mode="wrap")
        return y

    def backward_parameters(self, dy: FloatArray) -> None:
        """dL/dW[v] = sum of dL/dy over the places where the token is v; rows of tokens not met are 0.

        y at a place is the row of its token, so dy/dW[v] is 1 where the token is v and 0 elsewhere. The places are
        brought into order of their tokens by a stable sort and each run is added up: always in the same order.
        """
        order = np.argsort(self.tokens, kind="stable")
        sorted_tokens = self.tokens[order]
        rows = np.take(dy.reshape(-1, self.units), order, axis=0, out=self.sorted_rows[: len(order)], mode="wrap")
        starts = np.flatnonzero(np.diff(sorted_tokens, prepend=-1))
        self.d_weight[...] = 0
        self.d_weight[sorted_tokens[starts]] = np.add.reduceat(rows, starts, axis=0)

    def backward_input(self, dy: FloatArray) -> NoReturn:
        """Never asked for: the layer is a model's first."""
        raise RuntimeError("whole numbers have no gradient")

    def wrong_tokens(self, x: FloatArray) -> npt.NDArray[np.bool_] | None:
        """Where in x something is not a token; None where everything is."""
        if self._within(x) and np.array_equal(np.floor(x), x):
            return None
        wrong: npt.NDArray[np.bool_] = ~((x >= 0) & (x < self.vocabulary) & (x == np.floor(x)))
        return wrong

    def _within(self, x: FloatArray) -> bool:
        """Written so that nan fails too."""
        return bool(x.min(initial=0) >= 0 and x.max(initial=0) < self.vocabulary)

    def _refuse(self, x: FloatArray) -> NoReturn:
        value = float(x[self.wrong_tokens(x)][0])
        raise DataFault(f"a sample has {token_fault(value, self.vocabulary)}")


def token_fault(value: float, vocabulary: int) -> str:
    """What to say of a value that is no token."""
    return (
        f"{value:g} where a token is expected, a whole number from 0 to {vocabulary - 1}; "
        "enlarge the embedding's vocabulary or mend the data (tokens are not scaled)"
    )
