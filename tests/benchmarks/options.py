"""What the benchmarks' command lines share, and where they report progress."""

import argparse
import sys
from pathlib import Path

PEERS_ENVIRONMENT = Path(".venv-peers")


def positive_integer(text: str) -> int:
    """For argparse, which words the refusal."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def positive_number(text: str) -> float:
    """For argparse, which words the refusal."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def tell(line: str) -> None:
    """Progress goes to standard error: standard output holds the tables alone."""
    print(line, file=sys.stderr, flush=True)
