"""The three notebooks: built from their .py, one skeleton, parameters are settings, and they run headless."""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import make_row

from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.pipeline import results

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PARAMS, PRESETS = NOTEBOOKS / "params", ("quick", "original", "strong")
NAMES = ("01_deberta_v3_xsmall", "02_roberta_base", "03_electra_large")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


@pytest.mark.parametrize("name", NAMES)
def test_ipynb_is_what_its_py_builds(name):
    """`make notebooks` changes nothing: the pair says the same, without outputs, and which kernel papermill starts."""
    spec = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.build(name) == (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    nbformat.validate(read(name))
    assert read(name).metadata["kernelspec"]["name"] == "python3"
    for cell in read(name).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_code_cells_are_the_same_in_all_three():
    """Only the parameters cell differs, and the prose; the prose of each is its own."""
    first, *others = ([c for c in read(name).cells if c.cell_type == "code" and not is_parameters(c)] for name in NAMES)
    for cells in others:
        assert [c.source for c in cells] == [c.source for c in first]
    prose = ["".join(c.source for c in read(name).cells if c.cell_type == "markdown") for name in NAMES]
    assert len(set(prose)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_small_and_define_nothing(name):
    """At most 12 lines, no name of a setting, which a second run would take; parameters are literals."""
    defaults = RunConfig().to_dict()
    for cell in (cell for cell in read(name).cells if cell.cell_type == "code"):
        nodes = list(ast.walk(ast.parse(cell.source.replace("%matplotlib", "# %matplotlib"))))
        kinds = {type(node) for node in nodes}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}
        if is_parameters(cell):
            assert kinds <= {ast.Module, ast.Assign, ast.Name, ast.Store, ast.Constant, ast.List, ast.Load}
            namespace: dict = {}
            exec(cell.source, namespace)
            config = RunConfig.from_namespace(namespace).to_dict()
            assert {key for key, value in config.items() if value != defaults[key]} <= {"backbone"}
        else:
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 12
            assert not {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} & set(defaults)


def test_runs_through_papermill(tiny, write_csv, tmp_path):
    """Headless, as users run it: a cross-encoder with extra rows, by parameters alone; all have the same code."""
    extra = write_csv("extra.csv", [make_row(number, 0) for number in range(3)])
    out, file = tmp_path / "run", PARAMS / "demo.yaml"
    small = {"backbone": tiny, "out": out, "max_length": 32, "max_train_rows": 60, "architecture": "cross",
             "extra_train": extra, "start_from": "structure_logistic"}  # fmt: skip
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{NAMES[0]}.ipynb", tmp_path / "done.ipynb", "-f", file]
    command += ["--no-progress-bar", *(part for item in small.items() for part in ("-p", *item))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "result.json").read_text())["backbone"] == str(tiny)
    used = json.loads((out / "config.json").read_text())["settings"]
    given = RunConfig.from_yaml(file, {name: str(value) for name, value in small.items()}).to_dict()
    kept = {*read_settings(file), *small}
    assert {name: used[name] for name in kept} == {name: given[name] for name in kept}
    executed = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    shown = "".join(o.get("text", "") + str(o.get("data", "")) for c in executed.cells for o in c.get("outputs", []))
    assert "untrained model, log loss" in shown and "What to try next:" in shown
    assert shown.count("image/png") == 5
    assert not any(o.get("name") == "stderr" for c in executed.cells for o in c.get("outputs", []))


def test_settings_show_first_what_was_set():
    """A setting of the run, one that the recipe filled in, and one that nobody touched, in this order."""
    given = RunConfig(backbone="minilm", num_folds=5)
    table = results.settings_table(given, replace(given, learning_rate=3e-5))
    assert list(table.index[:3]) == ["backbone", "num_folds", "learning_rate"]
    assert table.iloc[2].tolist() == ["3e-05", "from the backbone's recipe"]
    assert table["where from"].value_counts().to_dict() == {
        "set for this run": 2, "from the backbone's recipe": 1, "default": len(table) - 3
    }  # fmt: skip
