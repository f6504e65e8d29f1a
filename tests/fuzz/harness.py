"""One harness under atheris: `python -m tests.fuzz.harness NAME FOLDER [libFuzzer's flags]`.

A harness is a module here with SEEDS, inputs as they should be, and read(data), which lets nothing out but what is a
finding. What it imports is instrumented, so that atheris sees which inputs lead where.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import atheris

INSTRUMENTED = ["protos", "worker", "tests.fuzz", "yaml", "zipfile", "csv"]


def main(name: str, folder: Path, flags: list[str]) -> None:
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        module = importlib.import_module(f"tests.fuzz.{name}")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(module.SEEDS):
        module.read(seed)  # a seed that is refused would lead nowhere
        (corpus / f"seed-{number}").write_bytes(seed)
    warnings.simplefilter("ignore")
    atheris.Setup([name, str(corpus), *flags], module.read)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
