"""Kernel folders: a notebook with its parameters put in, and the kernel-metadata.json that Kaggle's client reads."""

from collections.abc import Sequence
from pathlib import Path

import jupytext
import layout
import nbformat
from papermill.parameterize import parameterize_notebook

from prefcls_lib.models.recipes import HUB_NAMES
from prefcls_lib.runtime.files import write_json
from prefcls_lib.runtime.kaggle import COMPETITION

TRAIN_HOURS = 11.5  # of the 12 that a Kaggle run may take
SUBMIT_HOURS = 8.0  # of the 9 that a rerun in a code competition may take
ONE_SEED = ("03_electra_large",)  # others train two, one on each T4; why: README.md


def default_parameters(notebook: str, backbones: list[str]) -> tuple[dict, str]:
    """What a training kernel sets, and a note where it trains another backbone than the notebook's own.

    Args:
        notebook: of layout.NOTEBOOKS.
        backbones: folder names in the data set of backbones, at least one.
    """
    own = layout.OWN_BACKBONE[notebook]
    names = (own, HUB_NAMES[own].split("/")[-1])
    backbone = next((name for name in names if name in backbones), backbones[0])
    note = "" if backbone in names else f"{notebook}: {own} is not among BACKBONES, so it trains {backbone}"
    seeds = 1 if notebook in ONE_SEED else 2
    return {"backbone": backbone, "num_seeds": seeds, "time_budget_hours": TRAIN_HOURS}, note


def write_training(
    folder: Path, owner: str, notebook: str, parameters: dict, kernel_sources: Sequence[str] = ()
) -> None:
    """Write a training kernel's folder; `kernel_sources` are kernels whose output it gets as an input."""
    text = (layout.ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
    data_sets = (layout.LIBRARY, layout.BACKBONES, *((layout.EXTRA,) if parameters.get("extra_train") else ()))
    _write_kernel(
        folder, owner, put_parameters(nbformat.reads(text, as_version=4), parameters), data_sets, kernel_sources
    )


def write_submit(folder: Path, owner: str, kernel_sources: Sequence[str]) -> None:
    """Write the submit kernel's folder: it reads the outputs of `kernel_sources`, or where there are none the runs."""
    notebook = put_parameters(build_submit(), {"time_budget_hours": SUBMIT_HOURS})
    data_sets = (layout.LIBRARY,) if kernel_sources else (layout.LIBRARY, layout.RUNS)
    _write_kernel(folder, owner, notebook, data_sets, kernel_sources)


def build_submit() -> nbformat.NotebookNode:
    """The submit notebook, made from submit.py beside this file."""
    notebook = jupytext.read(Path(__file__).with_name("submit.py"))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
    return notebook


def put_parameters(notebook: nbformat.NotebookNode, parameters: dict) -> str:
    """The text of a notebook with an injected-parameters cell, as `papermill --prepare-only` leaves it.

    Kaggle runs it with no parameters of its own, and the injected cell stays.
    """
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])  # papermill expects them
    notebook.metadata.setdefault("papermill", {})
    prepared = parameterize_notebook(notebook, parameters)
    for cell in prepared.cells:
        if "injected-parameters" in cell.metadata["tags"]:
            cell["id"] = "cell-injected"  # papermill's is random
    return nbformat.writes(prepared) + "\n"


def _write_kernel(
    folder: Path, owner: str, notebook_text: str, data_sets: Sequence[str], kernel_sources: Sequence[str]
) -> None:
    slug = layout.kernel_slug(folder.name)
    folder.mkdir(parents=True)
    code_file = f"{slug}.ipynb"
    (folder / code_file).write_text(notebook_text, encoding="utf-8")
    metadata = {
        "id": f"{owner}/{slug}",
        "title": slug.replace("-", " "),
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "competition_sources": [COMPETITION],
        "dataset_sources": [f"{owner}/{name}" for name in data_sets],
        "kernel_sources": list(kernel_sources),
        "model_sources": [],
    }
    write_json(folder / "kernel-metadata.json", metadata)
