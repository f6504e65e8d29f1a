"""Resumable state of a run: weights, optimizer state and where in the data it stands, one safetensors file each.

Rules: a checkpoint is complete or absent (temporary file, fsync, rename, fsync of the folder), and one that was changed
since is known by its checksum (checked_file.py). State is stored over the whole flat vector and never by rank, so any
number of ranks can take it up. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from worker.checked_file import damage, write_checked
from worker.errors import CheckpointFault
from worker.measurements import Position, from_plain

FILE_NAME = re.compile(r"step-(\d{9})\.safetensors")
PARAMETERS = "parameters"
STATE_PREFIX = "optimizer."
BEST = "best_parameters"
MODEL_STATE = "model_state"
BEST_MODEL_STATE = "best_model_state"


@dataclass(frozen=True)
class Checkpoint:
    """A point at a step boundary from which training goes on as if it had never stopped."""

    step: int  # steps done
    epoch: int  # epochs done
    samples: int  # samples trained on
    layout_digest: str
    decayed: list[tuple[int, int]]  # ranges of the flat vector that weight decay applies to
    parameters: np.ndarray  # (parameter_count,) float32
    state: dict[str, np.ndarray]  # optimizer arrays of the same length; empty at step 0
    validations: tuple[dict[str, Any], ...] = ()  # what each evaluation so far came to, as in metrics.jsonl
    best: np.ndarray | None = None  # the evaluated weights of the best epoch, where they are to be kept
    model_state: np.ndarray | None = None  # (state_count,) float32, running statistics; None where there are none
    best_model_state: np.ndarray | None = None  # those of the best epoch
    # In the midst of an epoch, as in Position: what is done of it.
    batches: int = 0
    sums: tuple[float, float, int] = (0.0, 0.0, 0)
    highest_loss: float = 0.0

    @property
    def position(self) -> Position:
        """How far the run had come."""
        return Position(**{field.name: getattr(self, field.name) for field in fields(Position)})


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write one file atomically.

    Raises:
        CheckpointFault: the disk refused; nothing is left under `path`.
    """
    tensors = {PARAMETERS: checkpoint.parameters}
    tensors |= {STATE_PREFIX + name: array for name, array in checkpoint.state.items()}
    optional = {
        BEST: checkpoint.best,
        MODEL_STATE: checkpoint.model_state,
        BEST_MODEL_STATE: checkpoint.best_model_state,
    }
    tensors |= {name: array for name, array in optional.items() if array is not None}
    metadata = {
        "layout_digest": checkpoint.layout_digest,
        "decayed": json.dumps(checkpoint.decayed),
        **{name: json.dumps(value) for name, value in asdict(checkpoint.position).items()},
    }
    with replacing(path) as temporary:
        write_checked(temporary, tensors, metadata)


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader sees the old file or the whole new one, even across a power cut.

    Raises:
        CheckpointFault: the disk refused.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, straight from the arrays: they are not copied.

    Raises:
        CheckpointFault: the disk refused.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(0, str(error)) from error


@contextmanager
def replacing(path: Path, remedy: str = "name another folder with -o") -> Iterator[Path]:
    """A temporary file beside `path` to write to; when the block ends well it is on disk and takes the path's name.

    Args:
        remedy: what a person can do beside freeing space, for the message.

    Raises:
        CheckpointFault: the disk refused; the old file is untouched and the temporary one gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointFault(f"{path}: cannot be written: {error.strerror}; free some space or {remedy}") from error
    finally:
        with suppress(OSError):  # where not even that can be asked, there is nothing, and the fault above says why
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one file.

    Raises:
        CheckpointFault: it is not there, damaged, or not a checkpoint.
    """
    try:
        if what := damage(path):
            raise CheckpointFault(f"{path}: is damaged: {what}")
    except FileNotFoundError as error:
        raise CheckpointFault(f"{path}: is not there") from error
    except OSError as error:
        raise CheckpointFault(f"{path}: cannot be read: {error.strerror}") from error
    tensors, metadata = read_safetensors(path)
    try:
        parameters = tensors.pop(PARAMETERS)
        best, model_state, best_model_state = (
            tensors.pop(name, None) for name in (BEST, MODEL_STATE, BEST_MODEL_STATE)
        )
        return Checkpoint(
            **vars(from_plain({field.name: json.loads(metadata[field.name]) for field in fields(Position)})),
            layout_digest=metadata["layout_digest"],
            decayed=[(int(start), int(stop)) for start, stop in json.loads(metadata["decayed"])],
            parameters=parameters,
            state={name.removeprefix(STATE_PREFIX): array for name, array in tensors.items()},
            best=best,
            model_state=model_state,
            best_model_state=best_model_state,
        )
    except KeyError as error:
        raise CheckpointFault(f"{path}: {error.args[0]} is missing: this is not a checkpoint") from error
    except (TypeError, ValueError) as error:
        raise CheckpointFault(f"{path}: its metadata is damaged: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays and the metadata of a safetensors file.

    Raises:
        CheckpointFault: it is not there or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  # not a dict
    except FileNotFoundError as error:
        raise CheckpointFault(f"{path}: is not there; name the output folder of a finished run") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFault(f"{path}: is damaged: {error}") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies."""
    return folder / f"step-{step:09d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name))


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest one that can be read; each damaged one on the way is named through `say`.

    Raises:
        CheckpointFault: there is none.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except CheckpointFault as fault:
            say(f"skipped a checkpoint: {fault}")
    raise CheckpointFault(
        f"{folder}: holds no checkpoint that can be read ({len(paths)} damaged); start anew without --resume"
    )


def remove_leftovers(folder: Path, newest: int) -> None:
    """Remove what a killed process left half written, and checkpoints after step `newest`, from which a run goes on.

    Those are damaged; as the newest few they would push out the good ones that come.
    """
    later = [path for path in list_checkpoints(folder) if path.name > checkpoint_path(folder, newest).name]
    for path in [*folder.glob(".step-*.tmp"), *later]:
        if path.is_file():
            path.unlink(missing_ok=True)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
