"""Print the requirements of one dependency group of pyproject.toml, one a line, for `xargs pip install`.

`pip install --group` does this from pip 25.1 on; the pip inside a new Python 3.11 environment is older.
"""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"

if __name__ == "__main__":
    print("\n".join(tomllib.loads(PROJECT.read_text())["dependency-groups"][sys.argv[1]]))
