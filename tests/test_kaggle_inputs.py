"""Attached inputs: every mount layout, wrapper folders, a library as folder or wheel, inputs attached twice."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import pytest

import prefcls_lib
from prefcls_lib.config import RunConfig
from prefcls_lib.models.backbones import find_backbone
from prefcls_lib.pipeline.job import read_job
from prefcls_lib.runtime import kaggle
from prefcls_lib.runtime.files import UserError

ROOT = Path(prefcls_lib.__file__).parents[1]
COMPETITION = "llm-classification-finetuning"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """An empty input root."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(folder))
    return folder


def put(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "place", [f"competitions/{COMPETITION}", COMPETITION, f"competitions/{COMPETITION}/data", f"{COMPETITION}/data"]
)
def test_competition_is_found_in_every_layout(root, place):
    """New and old mounts, each with an extra folder; where it is missing, each place is named."""
    with pytest.raises(UserError) as error:
        kaggle.find_competition_file("train.csv")
    assert str(root / place.replace("/data", "/*") / "train.csv") in str(error.value)
    wanted = put(root / place / "train.csv")
    assert kaggle.find_competition_file("train.csv") == wanted


@pytest.mark.parametrize(
    "place",
    ["datasets/me/roberta-base", "roberta-base", "datasets/me/prefcls-backbones/roberta-base",
     "prefcls-backbones/roberta-base", "prefcls-backbones/extra/roberta-base",
     "datasets/me/prefcls-backbones/extra/roberta-base", "roberta-base/extra",
     "models/me/roberta-base/pytorch/default/1", "roberta-base/transformers/base/3",
     "models/me/roberta-base/pytorch/default/1/extra"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["roberta-base", "FacebookAI/roberta-base"])
def test_backbone_is_found_in_every_layout(root, place, name):
    """Data sets that are it or hold it, models with framework, variation and version, and a wrapper folder."""
    wanted = put(root / place / "config.json", '{"model_type": "roberta"}').parent
    assert find_backbone(name) == wanted


def test_a_run_named_as_the_backbone_is_not_taken_for_it(root):
    """A run folder has a config.json too, and often the backbone's name; so have the folders of its models."""
    runs = {"prefcls-runs/roberta-base": "submission.csv", "roberta-base/x/model/fold0": "preference.json"}
    for place, other in runs.items():
        put(root / place / "config.json", "{}")
        put(root / place / other)
    wanted = put(root / "prefcls-backbones" / "roberta-base" / "config.json").parent
    assert find_backbone("roberta-base") == wanted


@pytest.mark.parametrize(
    ("find", "places", "changed"),
    [(lambda: kaggle.find_competition_file("test.csv"), [f"competitions/{COMPETITION}", COMPETITION], "test.csv"),
     (lambda: find_backbone("roberta-base") / "config.json",
      ["datasets/me/one/roberta-base", "datasets/me/two/roberta-base"], "model.safetensors")],
)  # fmt: skip
def test_attached_twice_is_fine_if_equal_and_refused_if_not(root, find, places, changed):
    """Two mounts of one thing are one; two that differ are a question that only the user can answer."""
    for place in places:
        for name in ("test.csv", "config.json", "model.safetensors"):
            put(root / place / name)
    assert find().parent == root / places[0]
    put(root / places[1] / changed, "other")
    with pytest.raises(UserError, match="more than once") as error:
        find()
    assert all(str(root / place) in str(error.value) for place in places)


def test_attached_runs_are_found_and_counted_once(root, finished_run):
    """A notebook's output, a folder in a data set, a wrapper; the same run through two mounts is one run."""
    for place in ("notebooks/me/prefcls-02", "datasets/me/prefcls-runs/wrapper/other"):
        shutil.copytree(finished_run, root / place, ignore=shutil.ignore_patterns("checkpoint"))
    assert len(kaggle.attached_runs()) == 1
    result = json.loads((finished_run / "result.json").read_text())
    put(root / "datasets/me/prefcls-runs/wrapper/other/result.json", json.dumps({**result, "seed": 7}))
    assert [path.name for path in kaggle.attached_runs()] == ["prefcls-02", "other"]
    blend = put(root / "datasets/me/prefcls-runs/blend.json")
    assert kaggle.find_blend() == blend
    put(root / "datasets/me/other-runs/blend.json", "another")
    with pytest.raises(UserError, match="more than once"):
        kaggle.find_blend()


def test_run_folder_without_a_name_is_that_of_what_is_trained(home, monkeypatch):
    """The backbone's, and with `init_from` the reward model's: two presets do not share a folder."""
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    files = {name: str(home / f"{name}.csv") for name in ("train", "test")}
    for changes, name in (({"backbone": "a/encoder"}, "encoder"), ({"init_from": "b/scorer"}, "scorer")):
        assert read_job(RunConfig(**files, **changes, num_folds=3)).folder == Path("runs") / name


def first_cell() -> str:
    """The notebooks' cell that finds the library; the submit notebook has the same."""
    cells = {}
    for path in [*sorted((ROOT / "notebooks").glob("0*.py")), ROOT / "kaggle" / "submit_notebook.py"]:
        cells[path.name] = next(c.source for c in jupytext.read(path).cells if "importlib.util" in c.source)
    assert len(set(cells.values())) == 1, cells
    return cells["submit_notebook.py"]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The library's folder as a bundle has it, with a commit."""
    folder = tmp_path_factory.mktemp("library") / "prefcls_lib"
    shutil.copytree(ROOT / "prefcls_lib", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "commit.txt").write_text("0123abcd\n")
    return folder


def run_first_cell(root: Path, code: str) -> subprocess.CompletedProcess:
    """In a Python with the packages but not with this repository; then `code`."""
    code = (
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n{first_cell()}\n{code}"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PREFCLS_INPUT_ROOT"] = str(root)
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("place", "packed"),
    [("datasets/me/prefcls-lib", False), ("prefcls-lib/wrapper", False),
     ("datasets/me/prefcls-lib/prefcls_lib-0.1.0-py3-none-any.whl", False),
     ("prefcls-lib/prefcls_lib-0.1.0-py3-none-any.whl", True), ("datasets/me/prefcls/x/lib (1).whl", True)],
)  # fmt: skip
def test_library_is_found(root, library, place, packed):
    """As a folder, in a wrapper, as a wheel that the upload unpacked, and as a wheel of any name, with its rows."""
    (root / place).parent.mkdir(parents=True)
    if packed:
        with zipfile.ZipFile(root / place, "w") as wheel:
            for path in sorted(library.rglob("*")):
                wheel.write(path, path.relative_to(library.parent))
    else:
        shutil.copytree(library, root / place / "prefcls_lib")
    code = "import prefcls_lib.runtime.kaggle as kaggle; print(kaggle.library_commit(), kaggle.__file__)"
    if packed:
        code += "; from prefcls_lib.data.loading import read_rows, sample_path"
        code += "; assert len(read_rows(sample_path('train'), labelled=True)) == 770"
    done = run_first_cell(root, code)
    said = f"0123abcd {root / place}/prefcls_lib/runtime/kaggle.py\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_missing_library_lists_what_was_tried(root):
    """The one error that cannot come from the library."""
    done = run_first_cell(root, "")
    assert "attach the data set prefcls-lib" in done.stderr
    assert f"{root}: datasets/*/prefcls*/prefcls_lib/__init__.py" in done.stderr


def test_a_file_that_two_patterns_match_is_one(root):
    """datasets/OWNER/SLUG in the new layout looks like a wrapper in the old one."""
    found = put(root / "datasets" / "me" / "roberta-base" / "config.json")
    patterns = ["datasets/*/roberta-base/config.json", "*/*/roberta-base/config.json"]
    assert kaggle.glob_inputs(patterns) == [found]
