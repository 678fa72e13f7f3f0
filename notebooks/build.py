"""Build NAME.ipynb from NAME.py: no outputs, fixed cell ids, so that equal text gives equal bytes.

python notebooks/build.py 02_roberta_base
"""

import sys
from pathlib import Path

import jupytext


def build(name: str) -> str:
    """The text of NAME.ipynb, made from NAME.py beside this file."""
    notebook = jupytext.read(Path(__file__).parent / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
    return jupytext.writes(notebook, fmt="ipynb")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(__file__).with_name(f"{name}.ipynb").write_text(build(name), encoding="utf-8")
