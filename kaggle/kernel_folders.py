"""Kernel folders: a notebook with its parameters put in, and the kernel-metadata.json that Kaggle's client reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jupytext
import layout
import nbformat
from papermill.parameterize import parameterize_notebook

from prefcls_lib.runtime.files import write_json
from prefcls_lib.runtime.kaggle import COMPETITION

TRAIN_HOURS = 11.5  # of the 12 that a Kaggle run may take
SUBMIT_HOURS = 8.0  # of the 9 that a rerun in a code competition may take
ONE_SEED = ("03-electra-large",)  # the others train two, one on each T4; README.md says why
FIRST_CELL = """\
# Stops where another version of a data set is attached than was sent with this notebook; not in a rerun, where
# any submission is better than none.
import os
from pathlib import Path

_sent = {marks!r}
_root = Path(os.environ.get("PREFCLS_INPUT_ROOT", "/kaggle/input"))
for _name, _mark in _sent.items():
    _found = [path for mount in ("datasets/*/", "") for path in _root.glob(f"{{mount}}{{_name}}/{content}")]
    _marks = {{path.read_text().strip() for path in _found}}
    if _marks != {{_mark}} and "KAGGLE_IS_COMPETITION_RERUN" not in os.environ:
        raise RuntimeError(f"another version of {{_name}} is attached: {{_marks or 'none'}}, sent was {{_mark}}")
    print(f"{{_name}}: {{_marks}} in {{_found[0].parent if _found else 'no folder'}}")
"""


def default_parameters(notebook: str, backbone: str) -> dict:
    """What a training kernel sets: `notebook` of layout.OWN_BACKBONE, `backbone` as `layout.backbone_slug` gives it."""
    return {"backbone": backbone, "num_seeds": 1 if notebook in ONE_SEED else 2, "time_budget_hours": TRAIN_HOURS}


def read_notebook(name: str) -> nbformat.NotebookNode:
    """The notebook of a kernel: a training notebook, or the submit notebook, made from submit_notebook.py."""
    if name != layout.SUBMIT:
        return nbformat.read(layout.ROOT / "notebooks" / f"{name.replace('-', '_')}.ipynb", as_version=4)
    return jupytext.read(Path(__file__).with_name("submit_notebook.py"))


def put_parameters(notebook: nbformat.NotebookNode, parameters: Mapping[str, object]) -> nbformat.NotebookNode:
    """A notebook with an injected-parameters cell, as `papermill --prepare-only` leaves it.

    Kaggle runs it with no parameters of its own, and the injected cell stays.
    """
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])  # papermill expects them
    notebook.metadata.setdefault("papermill", {})
    return parameterize_notebook(notebook, dict(parameters))


def write_kernel(
    folder: Path, owner: str, parameters: Mapping[str, object], data_sets: Sequence[Path], sources: Sequence[str] = ()
) -> None:
    """Write a kernel's folder, which is named as the kernel: its notebook with its parameters.

    It gets the data sets (folders), whose versions it checks, and the output of kernels as inputs.
    """
    slug = layout.kernel_slug(folder.name)
    prepared = put_parameters(read_notebook(folder.name), parameters)
    marks = {path.name: layout.read_mark(path) for path in data_sets}
    source = FIRST_CELL.format(marks=marks, content=layout.CONTENT).rstrip()
    prepared.cells.insert(0, nbformat.v4.new_code_cell(source, metadata={"tags": ["sent"]}))
    for number, cell in enumerate(prepared.cells):
        cell["id"] = f"cell-{number:02d}"  # else random
    folder.mkdir(parents=True)
    (folder / f"{slug}.ipynb").write_text(nbformat.writes(prepared) + "\n", encoding="utf-8")
    metadata = {
        "id": f"{owner}/{slug}",
        "title": slug.replace("-", " "),
        "code_file": f"{slug}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "competition_sources": [COMPETITION],
        "dataset_sources": [f"{owner}/{path.name}" for path in data_sets],
        "kernel_sources": list(sources),
    }
    write_json(folder / "kernel-metadata.json", metadata)
