"""Kernel folders: a notebook with its parameters put in, and the kernel-metadata.json that Kaggle's client reads."""

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


def write_kernels(folder: Path, owner: str, backbones: list[str], has_runs: bool) -> list[str]:
    """Write the four kernel folders; return what the user should know of them.

    Args:
        folder: kernels/ of the bundle.
        owner: Kaggle user name.
        backbones: folder names in the data set of backbones, at least one.
        has_runs: the bundle has a data set of runs. Without it `submit` reads the training kernels' outputs.
    """
    notes = []
    kernels = []
    for notebook in layout.NOTEBOOKS:
        kernel = layout.kernel_name(notebook)
        own = layout.OWN_BACKBONE[notebook]
        names = (own, HUB_NAMES[own].split("/")[-1])
        backbone = next((name for name in names if name in backbones), backbones[0])
        if backbone not in names:
            notes.append(f"kernel {kernel}: {own} is not among BACKBONES, so it trains {backbone}")
        text = (layout.ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
        parameters = {"backbone": backbone, "time_budget_hours": TRAIN_HOURS}
        notebook_text = put_parameters(nbformat.reads(text, as_version=4), parameters)
        sources = {"dataset_sources": [f"{owner}/{layout.LIBRARY}", f"{owner}/{layout.BACKBONES}"]}
        _write_kernel(folder / kernel, owner, notebook_text, sources)
        kernels.append(f"{owner}/{layout.kernel_slug(kernel)}")
    sources = {"dataset_sources": [f"{owner}/{layout.LIBRARY}"]}
    if has_runs:
        sources["dataset_sources"].append(f"{owner}/{layout.RUNS}")
    else:
        sources["kernel_sources"] = kernels
    submit = put_parameters(build_submit(), {"time_budget_hours": SUBMIT_HOURS})
    _write_kernel(folder / layout.SUBMIT, owner, submit, sources)
    return notes


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


def _write_kernel(folder: Path, owner: str, notebook_text: str, sources: dict) -> None:
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
        "dataset_sources": [],
        "kernel_sources": [],
        "model_sources": [],
        **sources,
    }
    write_json(folder / "kernel-metadata.json", metadata)
