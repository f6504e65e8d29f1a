"""The layers, under the names the job file gives them: those of the oneof in `Layer` of protos/job.proto.

A new layer is a message in job.proto, a class that keeps to layer.py, and a line here.
"""

from typing import Final

from worker.engine.layers.dense import Dense
from worker.engine.layers.elementwise import LeakyRelu, Relu, Sigmoid, Tanh
from worker.engine.layers.layer import Layer
from worker.engine.layers.softmax import Softmax

LAYERS: Final[dict[str, type[Layer]]] = {
    "dense": Dense,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "softmax": Softmax,
}
