"""Odd, damaged and hostile inputs from public bug reports: the command of a user, and what must come of it."""

import csv
import io
import itertools
import json
import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill.cli
from conftest import TWO_FOLDS, make_row, read_tree, run_arguments, run_small

from prefcls_lib.config import RunConfig
from prefcls_lib.pipeline import folds, job, steps
from prefcls_lib.runtime.files import UserError

ROOT = Path(__file__).parents[1]
TEXTS = ["prompt", "response_a", "response_b"]


def as_csv(rows: list[dict]) -> bytes:
    """Rows as a CSV file; lists are JSON."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return buffer.getvalue().encode()


def zipped(**members: str | bytes) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("_csv", ".csv"), text)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_one_call_loads_what_transformers_reads():
    """`from_pretrained` is called in one place, which forbids code; the model card's example in a message is text."""
    calls = []
    for place in ("prefcls_lib", "kaggle", "report", "notebooks", "figs"):
        for path in sorted((ROOT / place).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            calls += [(path.name, line) for line in lines if ".from_pretrained(" in line.replace("(...)", "")]
    [(name, line)] = calls
    assert (name, "trust_remote_code=False" in line) == ("backbones.py", True)


# --- settings

MEANT = {"max_length": ("0256", 256), "seed": ("010", 10), "out": ("2024", "2024"), "folds": ("0,1", (0, 1)),
         "mixed_precision": ("no", "no")}  # fmt: skip


def test_settings_are_read_as_a_person_means_them(prefcls, tmp_path, monkeypatch):
    """The same with --set, in a YAML file, and as papermill translates -p and -f into a notebook's cell."""
    seen = []

    def run(config: RunConfig, network: bool) -> None:
        seen.append(config)
        raise UserError("enough")

    monkeypatch.setattr(steps, "run", run)
    expected = RunConfig(**{name: value for name, (_, value) in MEANT.items()})
    prefcls("run", "--set", *[f"{name}={text}" for name, (text, _) in MEANT.items()])
    lines = [f"{name}: {text}" for name, (text, _) in MEANT.items()]
    prefcls("run", "--config", put(tmp_path / "all.yaml", "\n".join(lines).encode()))
    # papermill reads a file by YAML 1.1, in which 0256 is 174 and 010 is 8: only the text `no` is of concern there
    put(tmp_path / "no.yaml", b"mixed_precision: no")
    arguments = [part for name, (text, _) in MEANT.items() if text != "no" for part in ("-p", name, text)]
    arguments += ["--prepare-only", "-f", str(tmp_path / "no.yaml")]
    notebooks = [str(ROOT / "notebooks" / "01_deberta_v3_xsmall.ipynb"), str(tmp_path / "out.ipynb")]
    papermill.cli.papermill.main([*notebooks, *arguments], standalone_mode=False)
    namespace: dict[str, object] = {}
    for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    namespace["backbone"] = expected.backbone
    del namespace["__builtins__"]
    assert [*seen, RunConfig.from_namespace(namespace)] == [expected] * 3


def test_largest_seed_and_a_batch_above_the_rows(home, tmp_path):
    """The last seed that numpy takes, with a fold and a second seed above it; one step holds all rows."""
    settings = ("seed=4294967295", "folds=[1]", "num_seeds=2", "batch_size=65536")
    found = run_small(home, tmp_path / "run", *settings)["folds"]
    assert [(model["seed"], model["steps"]) for model in found] == [(2**32 - 1, 1), (0, 1)]


# --- signals


def test_stopped_outside_training(prefcls, home, finished_run, tmp_path, monkeypatch):
    """In three places, by Ctrl-C and by SIGTERM, ten times each: exit code 130 or 143, how to go on, nothing
    half-written; what is done is kept. At last the bytes of a run that nobody stopped."""
    arguments, out = run_arguments(home, tmp_path / "run", *TWO_FOLDS), tmp_path / "run"
    places = (job, "read_rows"), (job, "fit_out_of_fold"), (folds, "write_model_tables")
    for (owner, name), number in itertools.product(places, (signal.SIGINT, signal.SIGTERM)):
        real = getattr(owner, name)

        def stop(*given: object, real: Callable = real, number: int = number, **settings: object) -> object:
            try:
                os.kill(os.getpid(), number)
            finally:
                for _ in range(9):
                    os.kill(os.getpid(), number)
            return real(*given, **settings)  # a model that is being saved is saved, then SIGTERM counts

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            code, _, error = prefcls(*arguments)
        assert (code, "run the same command to resume" in error) == ({2: 130, 15: 143}[number], True)
        assert not list(tmp_path.rglob(".tmp-*")) and not (out / "result.json").exists()
    assert [path.name for path in sorted((out / "model").iterdir())] == ["fold0"]
    kept = (out / "model" / "fold0" / "model.safetensors").stat().st_mtime_ns
    code, said, _ = prefcls(*arguments)
    assert (code, "fold0: done before, kept" in said) == (0, True)
    assert (out / "model" / "fold0" / "model.safetensors").stat().st_mtime_ns == kept
    wanted, found = read_tree(finished_run), read_tree(out)
    assert found.keys() == wanted.keys() - {"notes.txt"}
    for name in ("submission.csv", "oof.csv", "model/fold1/model.safetensors"):
        assert found[name] == wanted[name]


def test_output_over_an_input_is_refused(prefcls, finished_run, tmp_path):
    """convert, blend and predict: over what they read, by whatever path; nothing changes."""
    train = put(tmp_path / "train.csv", as_csv([make_row(number, number % 3) for number in range(12)]))
    arena, test = (put(tmp_path / name, as_csv([make_row(90, 0)])) for name in ("arena.csv", "test.csv"))
    (tmp_path / "no").mkdir()
    before = read_tree(tmp_path) | read_tree(finished_run)
    run = ["--run", finished_run, "--test", test]
    for arguments in (
        ["convert", arena, "--out", arena],
        ["convert", arena, "--against", train, "--out", train],
        ["convert", arena, "--against", train, "--out", tmp_path / "." / "no" / ".." / "train.csv"],
        ["blend", "--runs", finished_run, "--out", finished_run / "result.json"],
        ["predict", *run, "--out", test],
        ["predict", *run, "--out", finished_run / "oof.csv"],
    ):
        code, _, error = prefcls(*arguments)
        assert (code, f"--out {arguments[-1]}: would overwrite what is read from " in error) == (2, True)
    assert read_tree(tmp_path) | read_tree(finished_run) == before
