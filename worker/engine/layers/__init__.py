"""The layers, under the names the job file gives them: those of the oneof in `Layer` of protos/job.proto.

A new layer is a message in job.proto, a class that keeps to layer.py, and a line here: layer.py says more.
"""

from typing import Final

from worker.engine.layers.attention import Attention
from worker.engine.layers.batch_norm import BatchNorm
from worker.engine.layers.conv2d import Conv2d
from worker.engine.layers.dense import Dense
from worker.engine.layers.dropout import Dropout
from worker.engine.layers.elementwise import Elu, LeakyRelu, Relu, Sigmoid, Softplus, Tanh
from worker.engine.layers.embedding import Embedding
from worker.engine.layers.flatten import Flatten
from worker.engine.layers.gated import Gelu, Silu
from worker.engine.layers.layer import Layer
from worker.engine.layers.layer_norm import LayerNorm
from worker.engine.layers.linear import Linear
from worker.engine.layers.pooling import AveragePool2d, GlobalAveragePool, MaxPool2d
from worker.engine.layers.positions import Positions
from worker.engine.layers.residual import Residual
from worker.engine.layers.softmax import Softmax

LAYERS: Final[dict[str, type[Layer]]] = {
    "dense": Dense,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "softmax": Softmax,
    "conv2d": Conv2d,
    "max_pool2d": MaxPool2d,
    "average_pool2d": AveragePool2d,
    "global_average_pool": GlobalAveragePool,
    "flatten": Flatten,
    "gelu": Gelu,
    "silu": Silu,
    "elu": Elu,
    "softplus": Softplus,
    "layer_norm": LayerNorm,
    "residual": Residual,
    "dropout": Dropout,
    "embedding": Embedding,
    "positions": Positions,
    "linear": Linear,
    "attention": Attention,
    "batch_norm": BatchNorm,
}
