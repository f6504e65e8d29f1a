"""Prints, layer by layer, the largest difference from PyTorch that the tests against it meet on the shapes they draw.

.venv-peers/bin/python -m tests.unit.engine.largest_differences
"""

import sys
from pathlib import Path

import pytest

from tests.unit.engine.differences import LARGEST, WHATS
from worker.engine.layers import LAYERS

TESTS = ("test_layers_against_torch.py", "test_stateful_against_torch.py", "test_batch_norm_against_torch.py")
TYPES = ("float64", "float32")


def main() -> int:
    """Run the tests, then print the table; the tests' exit code."""
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(str(Path(__file__).with_name(name)) for name in TESTS)])
    print("\n".join(table()))
    return int(code)


def table() -> list[str]:
    """Lines of a Markdown table: a row for each layer, in the order of the job file's schema."""
    heads = [f"{what}, {dtype}" for dtype in TYPES for what in WHATS]
    lines = ["| layer | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    rows = sorted({layer for layer, _, _ in LARGEST}, key=lambda layer: (list(LAYERS).index(layer.split()[0]), layer))
    for layer in rows:
        cells = [LARGEST.get((layer, dtype, what)) for dtype in TYPES for what in WHATS]
        lines.append(f"| {layer} | " + " | ".join("" if cell is None else f"{cell:.1e}" for cell in cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
