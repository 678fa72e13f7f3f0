"""Follow a kernel, by its status and the progress in its log, and bring its output back into a folder of runs/."""

import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import layout
import requests
from client import ENDED, SETTINGS, UNKNOWN, Kaggle, Kernel

from prefcls_lib.ensemble.blend import read_run
from prefcls_lib.pipeline.results import result_table, verdict
from prefcls_lib.runtime.files import UserError, read_json, write_whole

RUNS = layout.ROOT / "runs"
BYTES_AT_ONCE = 1 << 20
PUBLIC_SCORE = "public_score"  # in result.json, written by `make kaggle-submit`
SECONDS_BETWEEN_LOOKS = 30
MOST_LOOKS = 120  # in a row at something that does not move: an hour
PATIENCE = 3600.0  # seconds without a connection before the command ends; the kernel keeps running
PROGRESS = re.compile(r"\d%\||\bfold\d")  # a progress bar, or what the library prints about a fold
ADVICE = {
    r"OutOfMemoryError|out of memory": 'less memory: SET="max_tokens_per_micro_step=2048" or a smaller max_length',
    r"No space left on device": "the disk of the session is full: train fewer folds or seeds at once",
    r"no kernel image is available": "the GPU is too old for the image's torch: choose GPU T4 x2 on the kernel's page",
    r"another version of prefcls-": "a data set was changed after the kernel was sent: run the same command again",
    r"needs a GPU": f"no GPU: verify the account's phone ({SETTINGS}), and choose GPU T4 x2 on the kernel's page",
    r"attach the data set|was not found\. Tried": "an input is missing: run the same command again, which attaches it",
    r"DeadKernelError|Kernel died": "the session's memory was used up: a smaller max_length, or max_train_rows",
}


def wait_for(what: str, look: Callable[[], str], ended: Collection[str], moving: Collection[str] = ()) -> str:
    """Look at something until its state is one of `ended`, and return that; each state that is new is printed.

    After an hour in states that are neither `ended` nor `moving` it is given up.
    """
    shown, still = "", 0
    while still < MOST_LOOKS:
        state = look()
        if state != shown:
            print(f"{what}: {state}", flush=True)
        if state in ended:
            return state
        shown, still = state, 0 if state in moving else still + 1
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise UserError(f"{what}: {state} for an hour. Look at its page on Kaggle.")


def follow_kernel(kaggle: Kaggle, kernel: Kernel) -> str:
    """Show a kernel's status and progress until it ends; returns the last status, of a failure prints the reasons."""
    kaggle.patience = PATIENCE
    kaggle.left_there = f"{kernel} keeps running on Kaggle: {kernel.page}"
    print(f"{kernel}: {kernel.page}\nCtrl-C leaves it running.", flush=True)
    seen, status, failure = 0, "", ""

    def look() -> str:
        nonlocal seen, status, failure
        for number, text in enumerate(kaggle.log_lines(kernel) if status == "running" else ()):
            if number >= seen:  # after a lost connection the log comes again from its start
                seen = number + 1
                if PROGRESS.search(text):
                    print(text.strip(), flush=True)
        status, failure = kaggle.kernel_status(kernel) or (UNKNOWN, "")
        return status

    wait_for(str(kernel), look, ENDED, ("queued", "running", "cancel_requested"))
    kaggle.left_there = f"{kernel} has ended on Kaggle, where its output is kept: {kernel.page}"
    if status == "error":
        tail = "\n  ".join(deque(kaggle.log_lines(kernel), maxlen=20))
        advice = [text for sign, text in ADVICE.items() if re.search(sign, tail + failure)]
        print(f"{kernel} failed on Kaggle. {failure}".strip(), f"last lines of its log:\n  {tail or '(there is none)'}",
              *advice, f"its page: {kernel.page}", sep="\n", flush=True)  # fmt: skip
    return status


def fetch_output(kaggle: Kaggle, files: Mapping[str, str], runs: Path, name: str) -> Path:
    """Download an output, name -> address; returns its folder, runs/NAME or, where that exists, runs/NAME-2.

    A download that breaks off is repeated until it is whole.
    """
    taken = runs / name
    target = next(path for path in (taken, *(runs / f"{name}-{n}" for n in range(2, 1000))) if not path.exists())
    if target != taken:
        print(f"{taken} holds an earlier run and is kept; this one goes to {target}", flush=True)
    with write_whole(target) as folder:
        for file, address in files.items():
            path = folder / file
            if "\0" in file or not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"the output holds {file!r}, which cannot lie in its folder. Nothing was downloaded.")
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {file}", flush=True)
            kaggle.call(f"download of {file}", _download, address, path)
    return target


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


def find_here(kaggle: Kaggle, files: Mapping[str, str], *places: Path) -> Path | None:
    """The folder in one of `places` of the finished run in an output, whatever score was written into it."""
    if "result.json" in files:
        result = read_remote(kaggle, files["result.json"])
        for path in (path for place in places for path in sorted(place.glob("*/result.json"))):
            if {name: value for name, value in read_json(path).items() if name != PUBLIC_SCORE} == result:
                return path.parent
    return None


def report_run(folder: Path, runs: Path) -> None:
    """Check a finished run, print its table, and build the report of all runs beside them."""
    result = read_run(folder).result
    print(result_table(result).to_string(float_format="{:.4f}".format))
    print(verdict(result))
    print(f"run: {folder}; submission: {folder / 'submission.csv'}", flush=True)
    place = str(runs.resolve())
    command = [sys.executable, "-m", "report.build", "--runs", place, "--out", place]
    subprocess.run(command, cwd=layout.ROOT, check=False)
