"""Windows that slide over an image, for convolution and pooling: how many there are and what each of them sees.

Rules: an image is (height, width, channels). With padding `valid` windows lie inside the image and pixels that fill no
further one are left out; with `same` there are ceil(size / stride) windows a direction and what they lack is
added around the image, the odd pixel behind it, as TensorFlow and ONNX (SAME_UPPER) do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from worker.engine.params import FloatArray, Shape
from worker.errors import ModelFault

PADDINGS = ("valid", "same")


class Axis(NamedTuple):
    """Windows along one direction, in pixels."""

    size: int  # of the image
    window: int
    stride: int
    before: int  # added in front of the image
    after: int  # added behind it
    outputs: int  # windows that fit

    @property
    def padded(self) -> int:
        """Size of the image with what is added."""
        return self.before + self.size + self.after

    @property
    def inside(self) -> slice:
        """Where the image lies in the padded one."""
        return slice(self.before, self.before + self.size)

    def reached(self, offset: int) -> slice:
        """The padded pixels that stand at `offset` in some window, one for each window."""
        return slice(offset, offset + self.stride * (self.outputs - 1) + 1, self.stride)


class Windows(NamedTuple):
    """Windows over images of `channels` channels."""

    down: Axis
    across: Axis
    channels: int

    @property
    def padded_shape(self) -> Shape:
        """(height, width, channels) with what is added."""
        return (self.down.padded, self.across.padded, self.channels)

    @property
    def is_padded(self) -> bool:
        """Whether anything is added around the image."""
        return self.padded_shape[:2] != (self.down.size, self.across.size)

    @property
    def tile(self) -> bool:
        """Whether every pixel is seen by exactly one window."""
        return all(axis.stride == axis.window and axis.outputs * axis.window == axis.size for axis in self[:2])

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Every place within a window, row by row."""
        return [(i, j) for i in range(self.down.window) for j in range(self.across.window)]

    def at(self, padded: FloatArray, i: int, j: int) -> FloatArray:
        """The pixels at place (i, j) of every window: a view (n, outputs down, outputs across, channels)."""
        return padded[:, self.down.reached(i), self.across.reached(j)]

    def inside(self, padded: FloatArray) -> FloatArray:
        """The images within padded ones: a view (n, height, width, channels)."""
        return padded[:, self.down.inside, self.across.inside]

    def seen(self, padded: FloatArray) -> FloatArray:
        """What each window sees: a view (n, outputs down, outputs across, window height, window width, channels)."""
        sliding = np.lib.stride_tricks.sliding_window_view(padded, (self.down.window, self.across.window), (1, 2))
        return sliding[:, :: self.down.stride, :: self.across.stride].transpose(0, 1, 2, 4, 5, 3)


def slide(input_shape: Shape, name: str, window: Sequence[int], stride: Sequence[int], padding: str) -> Windows:
    """Windows over images of `input_shape`; `name` is what the job file calls the window.

    ModelFault where samples are no images, numbers are no window, or a window is larger than its image.
    """
    require_image(input_shape)
    if padding not in PADDINGS:
        raise ModelFault(f"padding: {padding!r} is not one of: {', '.join(PADDINGS)}")
    sizes, strides = pair(name, window), pair("stride", stride)
    height, width, channels = input_shape
    if padding == "valid" and (sizes[0] > height or sizes[1] > width):
        raise ModelFault(
            f"{name}: {sizes[0]} x {sizes[1]} is larger than its image, got samples of shape {input_shape}; "
            f"needs at most {height} x {width}, or padding: same"
        )
    down, across = (
        _axis(size, window, stride, padding)
        for size, window, stride in zip((height, width), sizes, strides, strict=True)
    )
    return Windows(down, across, channels)


def require_image(input_shape: Shape) -> None:
    """ModelFault where samples are no images."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ModelFault(f"got samples of shape {input_shape}, needs images (height, width, channels)")


def pair(name: str, values: Sequence[int]) -> tuple[int, int]:
    """(down, across) of one number for both directions, or two; ModelFault on anything else."""
    if len(values) not in (1, 2) or min(values) < 1:
        raise ModelFault(f"{name}: {list(values)} is not one number for both directions, or two: [down, across]")
    return (values[0], values[-1])


def _axis(size: int, window: int, stride: int, padding: str) -> Axis:
    if padding == "valid":
        return Axis(size, window, stride, 0, 0, (size - window) // stride + 1)
    outputs = -(-size // stride)
    lacking = max((outputs - 1) * stride + window - size, 0)
    return Axis(size, window, stride, lacking // 2, lacking - lacking // 2, outputs)
