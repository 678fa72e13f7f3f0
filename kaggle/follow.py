"""Follow a kernel on Kaggle: its status and the training's own progress, in one line that is redrawn."""

import re
import shutil
import sys
import time
from collections import deque

from client import ENDED, Kaggle, page_of

from prefcls_lib.runtime.files import UserError

SECONDS_BETWEEN_LOOKS = 30
LOOKS_WITHOUT_ANSWER = 20
PATIENCE = 3600.0  # seconds without a connection before the command ends; the kernel keeps running
PROGRESS = re.compile(r"\d%\||\bfold\d")  # a progress bar, or what the library prints about a fold
ADVICE = {
    r"OutOfMemoryError|out of memory": 'less memory: SET="max_tokens_per_micro_step=2048" or a smaller max_length',
    r"No space left on device": "the disk of the session is full: train fewer folds or seeds at once",
    r"no kernel image is available": "the GPU is too old for the image's torch: choose GPU T4 x2 on the kernel's page",
    r"attach the data set|was not found\. Tried": "an input is missing: run the same command again, which attaches it",
    r"DeadKernelError|Kernel died": "the session's memory was used up: a smaller max_length, or max_train_rows",
}


class StatusLine:
    """One line that is redrawn on a terminal; elsewhere a line for each text that is new."""

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._shown: set[str] = set()

    def show(self, text: str, seconds: float | None = None) -> None:
        """Show a text, on a terminal with the time that has passed."""
        if self._terminal:
            clock = "" if seconds is None else f"{_clock(seconds)} "
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{clock}{text}"[: width + 5], end="", flush=True)
        elif text not in self._shown:
            print(text, flush=True)
        self._shown.add(text)

    def end(self) -> None:
        """Leave the line as it is; what is printed next starts below it."""
        if self._terminal and self._shown:
            print(flush=True)


def wait_for_data_sets(kaggle: Kaggle, names: list[str]) -> None:
    """Wait until Kaggle has unpacked what was uploaded.

    Raises:
        UserError: it could not.
    """
    line = StatusLine()
    for name in names:
        while (status := kaggle.data_set_status(name)) != "ready":
            if status == "failed":
                raise UserError(f"data set {name}: Kaggle could not unpack it. Run the same command again.")
            line.show(f"data set {name}: {status or 'created'}, waiting until it is ready")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        line.show(f"data set {name}: ready")
        line.end()


def follow_kernel(kaggle: Kaggle, kernel: str) -> tuple[str, str]:
    """Show a kernel's status and progress until it ends; returns the last status, and Kaggle's message on a failure.

    Raises:
        UserError: the connection is lost for long, or the kernel was deleted.
    """
    kaggle.patience = PATIENCE
    kaggle.left_there = f"{kernel} keeps running on Kaggle: {page_of(kernel)}"
    print(f"{kernel}: {page_of(kernel)}\nCtrl-C leaves it running.", flush=True)
    line, seen, unknown, started = StatusLine(), 0, 0, time.monotonic()
    while unknown < LOOKS_WITHOUT_ANSWER:
        status, failure = kaggle.kernel_status(kernel) or ("unknown", "")
        unknown = unknown + 1 if status == "unknown" else 0
        line.show(status, time.monotonic() - started)
        if status in ENDED:
            line.end()
            kaggle.left_there = f"{kernel} has ended on Kaggle, where its output is kept: {page_of(kernel)}"
            return status, failure
        if status == "running":
            for number, text in enumerate(kaggle.log_lines(kernel)):
                if number >= seen:  # after a lost connection the log comes again from its start
                    seen = number + 1
                    if PROGRESS.search(text):
                        line.show(f"{status} | {text.strip()}", time.monotonic() - started)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise UserError(f"{kernel}: Kaggle does not know it any more. Look at its page: {page_of(kernel)}")


def explain_failure(kaggle: Kaggle, kernel: str, failure: str) -> str:
    """The last lines of a failed kernel's log, and what to change."""
    tail = "\n  ".join(deque(kaggle.log_lines(kernel), maxlen=20))
    advice = [text for sign, text in ADVICE.items() if re.search(sign, tail + failure)]
    parts = [f"{kernel} failed on Kaggle. {failure}".strip(), f"last lines of its log:\n  {tail or '(there is none)'}"]
    return "\n".join([*parts, *advice, f"its page: {page_of(kernel)}"])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
