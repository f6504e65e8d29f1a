"""PyTorch as pytorch_eager.py, model and loss compiled by torch.compile; each run compiles anew, as a first does."""

import os
import shutil
import sysconfig
from pathlib import Path

from stopwatch import print_absent, read_arguments


def lacking() -> str | None:
    """What torch.compile needs for a CPU and this machine does not have."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and there is no {compiler}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"torch.compile needs Python's headers and there is no {header}"


def main() -> None:
    arguments = read_arguments()
    reason = lacking()
    if reason:
        print_absent(reason)
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.scratch / "compiled")
    import torch
    from pytorch_eager import train

    train(arguments, prepare=torch.compile)


if __name__ == "__main__":
    main()
