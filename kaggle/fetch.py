"""Bring a kernel's output back: into a run folder of its own in runs/, whole; then the result table and the report."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import layout
import requests
from client import Kaggle, Kernel
from follow import StatusLine

from prefcls_lib.ensemble.finished import read_run
from prefcls_lib.pipeline.results import result_table, verdict
from prefcls_lib.runtime.files import UserError, read_json, write_whole

RUNS = layout.ROOT / "runs"
BYTES_AT_ONCE = 1 << 20
PUBLIC_SCORE = "public_score"  # in result.json, written by `make kaggle-submit`


def fetch_output(kaggle: Kaggle, kernel: Kernel, runs: Path, name: str) -> Path:
    """Download a kernel's output; returns its folder, runs/NAME or, where that exists, runs/NAME-2."""
    taken = runs / name
    target = next(path for path in (taken, *(runs / f"{name}-{n}" for n in range(2, 1000))) if not path.exists())
    if target != taken:
        print(f"{taken} holds an earlier run and is kept; this one goes to {target}", flush=True)
    write_whole(target, lambda temporary: download_files(kaggle, kaggle.output_files(kernel), temporary))
    return target


def download_files(kaggle: Kaggle, files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Download (name, address) pairs into a new folder; a download that breaks off is repeated until it is whole."""
    folder.mkdir(parents=True)
    line = StatusLine()
    for name, address in files:
        path = folder / name
        if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the output holds {name!r}, which cannot lie in its folder. Nothing was downloaded.")
        path.parent.mkdir(parents=True, exist_ok=True)
        line.show(f"downloading {name}")
        kaggle.call(f"download of {name}", _download, address, path)
    line.end()


def _download(address: str, path: Path) -> None:
    """Download a file, or what is missing of it, and compare its length with what was announced."""
    have = path.stat().st_size if path.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with _get(address, stream=True, headers=headers) as answer:
        resumed = answer.status_code == 206
        with path.open("ab" if resumed else "wb") as file:
            for part in answer.iter_content(BYTES_AT_ONCE):
                file.write(part)
        length = int(answer.headers.get("Content-Length", -1))
    if length >= 0 and path.stat().st_size != length + (have if resumed else 0):
        raise requests.ConnectionError(f"{path.name} broke off")


def read_remote(kaggle: Kaggle, address: str) -> dict:
    """A JSON file of an output."""

    return kaggle.call("a file of the output", lambda: _get(address).json())


def _get(address: str, **options) -> requests.Response:
    answer = requests.get(address, **options)
    answer.raise_for_status()
    return answer


def find_here(result: dict, runs: Path) -> Path | None:
    """The run folder in runs/ that has this result.json, whatever score was written into it."""
    for path in sorted(runs.glob("*/result.json")):
        here = read_json(path)
        if {key: value for key, value in here.items() if key != PUBLIC_SCORE} == result:
            return path.parent
    return None


def report_run(folder: Path, runs: Path) -> None:
    """Check a finished run, print its table, and build the report of all runs."""
    result = read_run(folder).result
    print(result_table(result).to_string(float_format="{:.4f}".format))
    print(verdict(result))
    print(f"run: {folder}; submission: {folder / 'submission.csv'}", flush=True)
    build_report(runs)


def build_report(runs: Path) -> None:
    """The report of all runs in `runs`, beside them."""
    place = str(runs.resolve())
    command = [sys.executable, "-m", "report.build", "--runs", place, "--out", place]
    subprocess.run(command, cwd=layout.ROOT, check=False)
