"""Weights to begin with, taken from a safetensors file that a run or another program left.

Rules: a tensor fits where a parameter has its name and its very shape; nothing is reshaped, cut or transposed. What
does not fit is named and its parameter begins as it would without the file. The file is checked whole before a run
writes anything, and read only where weights are filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worker.checkpoint import read_safetensors
from worker.data.files import reachable
from worker.engine.model import Model
from worker.errors import CheckpointFault, DataFault


@dataclass(frozen=True)
class InitialWeights:
    """What of a file goes into a model."""

    path: Path
    place: str  # what the job file calls it
    fitted: tuple[str, ...]  # names in the order of the model
    unfitted: tuple[str, ...]  # a sentence for each parameter or tensor left out

    def load(self, model: Model) -> None:
        """Write the tensors that fit into the attached parameters and the state, the rest untouched."""
        tensors = _read(self.path)
        values = model.named_parameters() | model.named_state()
        for name in self.fitted:
            values[name][...] = tensors[name]

    def lines(self) -> list[str]:
        """For people: one line in sum, then one for each thing that did not fit."""
        count = len(self.fitted)
        first = f"initialize_from: {count} parameter{'s' if count != 1 else ''} taken from {self.place}"
        return [first, *(f"initialize_from: not taken: {sentence}" for sentence in self.unfitted)]

    def summary(self) -> dict[str, Any]:
        """`initialized` of summary.json."""
        return {"file": self.place, "fitted": list(self.fitted), "unfitted": list(self.unfitted)}


def open_initial_weights(path: Path, model: Model, place: str = "") -> InitialWeights:
    """Hold a file against a model; messages name it `place`, where it was fetched from a URL.

    Raises:
        CheckpointFault: it is not there, damaged, holds a weight that is not a finite number, or nothing of it fits.
    """
    place = place or str(path)
    if not path.is_file():
        raise CheckpointFault(f"initialize_from: {place}: is no file; check the path in the job file")
    try:
        tensors = _read(path)
    except CheckpointFault as fault:
        message = str(fault).replace(str(path), place)
        raise CheckpointFault(f"initialize_from: {message}; name an intact safetensors file") from fault
    except DataFault as fault:
        raise DataFault(f"initialize_from: {fault}") from fault
    except OSError as error:
        raise CheckpointFault(
            f"initialize_from: {place}: cannot be read: {error.strerror}; see its permissions"
        ) from error
    except (TypeError, AttributeError) as error:  # bfloat16, float8 and their like, which NumPy does not know
        raise CheckpointFault(f"initialize_from: {place}: {error}; save its tensors as float32") from error
    fitted, unfitted = [], []
    slots = (*model.slots, *model.state_slots)
    for slot in slots:
        tensor = tensors.get(slot.name)
        if tensor is None:
            unfitted.append(f"{slot.name}: is not in the file")
        elif tensor.shape != slot.shape:
            unfitted.append(f"{slot.name}: has shape {tensor.shape} in the file and {slot.shape} in the model")
        elif tensor.dtype.kind != "f":
            unfitted.append(f"{slot.name}: is {tensor.dtype} in the file, needs floating-point numbers")
        elif not _all_finite(tensor, model.dtype):
            raise CheckpointFault(
                f"initialize_from: {place}: {slot.name} holds a value that is not a finite {model.dtype}; "
                "use another file"
            )
        else:
            fitted.append(slot.name)
    if not fitted:
        named = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise CheckpointFault(
            f"initialize_from: {place}: nothing fits the model: {'; '.join(unfitted[:3])}; the file holds {named}: "
            "names and shapes must be the same, and values floating-point numbers"
        )
    known = {slot.name for slot in slots}
    unfitted += [f"{name}: is in the file and not in the model" for name in sorted(tensors.keys() - known)]
    return InitialWeights(path, place, tuple(fitted), tuple(unfitted))


def _read(path: Path) -> dict[str, np.ndarray]:
    with reachable(str(path)) as here:
        try:
            return read_safetensors(Path(here))[0]
        except CheckpointFault as fault:
            raise CheckpointFault(str(fault).replace(here, str(path))) from fault


def _all_finite(tensor: np.ndarray, dtype: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found
        return bool(np.isfinite(tensor.astype(dtype)).all())
