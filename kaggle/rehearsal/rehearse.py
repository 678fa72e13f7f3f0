"""Run a bundle's notebooks here as Kaggle would: python kaggle/rehearsal/rehearse.py --rows 300

1. the training notebook, on the first 160 shipped rows as the competition
2. `submit` with its output attached, on the three test rows
3. `submit` again as a competition rerun, on rows as irregular as the hidden ones may be

PREFCLS_INPUT_ROOT takes the place of /kaggle/input, the folder `working` beside it that of /kaggle/working. No step has
a network, and all run the library of the bundle; see offline/sitecustomize.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the modules that build a bundle

import layout
import pandas as pd
import rows as irregular
from client import run_command

from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import check_submission
from prefcls_lib.runtime.files import UserError, read_json
from prefcls_lib.runtime.kaggle import COMPETITION

TRAIN_ROWS = 160  # of the shipped ones; enough for ten folds, few enough for a CPU at full length
OWNER = "me"  # of the attached data sets
OFFLINE = Path(__file__).with_name("offline")


def rehearse(num_rows: int) -> int:
    """All steps on the bundle of `make kaggle-bundle`, `num_rows` of the rerun; 0: they passed."""
    kernels = [path for path in sorted((layout.DIST / "kernels").glob("*")) if path.name != layout.SUBMIT]
    if not kernels:
        raise UserError("there is no bundle. Build one first: make kaggle-bundle OWNER=me NOTEBOOK=02-roberta-base")
    data_sets = {f"datasets/{OWNER}/{path.name}": path for path in (layout.DIST / "datasets").iterdir()}
    library = f"datasets/{OWNER}/{layout.LIBRARY}"
    with tempfile.TemporaryDirectory(prefix="prefcls-rehearsal-") as scratch:
        root = Path(scratch)
        run = run_kernel(kernels[0], make_step(root / "train", data_sets, sample_path("test")), "train")
        result, commit = read_json(run / "result.json"), layout.read_mark(data_sets[library]).split()[0]
        if result["versions"]["commit"] != commit:
            raise UserError(f"train: the library of commit {result['versions']['commit']} ran, not {commit}")
        print(f"train: {result['backbone']}, log loss {result['log_loss']:.4f}, commit {commit}", flush=True)
        output = f"notebooks/{OWNER}/{layout.kernel_slug(kernels[0].name)}"
        attached = {output: run, library: data_sets[library]}
        irregular.write_rows(root / "test.csv", irregular.make_rows(num_rows))
        for what, test, variables in (
            ("submit", sample_path("test"), {}),
            ("rerun", root / "test.csv", {"KAGGLE_IS_COMPETITION_RERUN": "1"}),
        ):
            step = make_step(root / what, attached, test)
            out = run_kernel(layout.DIST / "kernels" / layout.SUBMIT, step, what, **variables)
            if left_out := read_json(out / "submit.json")["left_out"]:
                raise UserError(f"{what}: {'; '.join(left_out)}")
    print("rehearsal passed", flush=True)
    return 0


def make_step(folder: Path, attached: dict[str, Path], test: Path) -> Path:
    """A folder with input/, as Kaggle attaches it, and an empty working/."""
    competition = folder / "input" / "competitions" / COMPETITION
    competition.mkdir(parents=True)
    (folder / "working").mkdir()
    train = pd.read_csv(sample_path("train"), dtype=str, keep_default_na=False, nrows=TRAIN_ROWS)
    train.to_csv(competition / "train.csv", index=False)
    shutil.copyfile(test, competition / "test.csv")
    for place, source in attached.items():
        shutil.copytree(source, folder / "input" / place, ignore=shutil.ignore_patterns(layout.METADATA))
    return folder


def run_kernel(kernel: Path, step: Path, what: str, **variables: str) -> Path:
    """Run a kernel's notebook as Kaggle does, papermill without parameters, and check its submission."""
    notebook = kernel / f"{layout.kernel_slug(kernel.name)}.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), "__notebook__.ipynb", "-y", "{}", "--no-progress-bar"]
    before = layout.list_files(step / "input")
    started = time.perf_counter()
    run_offline([*command, "-k", "python3"], step, what, **variables)
    if layout.list_files(step / "input") != before:
        raise UserError(f"{what}: writes into /kaggle/input, which is read-only on Kaggle")
    (test,) = step.glob("input/competitions/*/test.csv")
    check_submission(step / "working" / "submission.csv", list(read_rows(test, labelled=False)[ID]))
    print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)
    return step / "working"


def run_offline(command: list[str], step: Path, what: str, **variables: str) -> None:
    """Run a command in a step's working folder, without a network and with Kaggle's variables."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "PREFCLS"))},
        "PREFCLS_INPUT_ROOT": str(step / "input"),
        "PYTHONPATH": str(OFFLINE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(step / "cache"),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        **variables,
    }
    done = subprocess.run(
        command, cwd=step / "working", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise UserError(f"{what}: failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")


def main(argv: list[str] | None = None) -> int:
    """Rehearse; 0 when everything passed, 2 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300, help="rows of the rerun")
    arguments = parser.parse_args(argv)
    return run_command(lambda kaggle: rehearse(arguments.rows))


if __name__ == "__main__":
    sys.exit(main())
