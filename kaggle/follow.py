"""Follow a kernel on Kaggle: its status and the training's own progress, in one line that is redrawn."""

import re
import shutil
import sys
import time
from collections import deque

from client import ENDED, SETTINGS, Kaggle, Kernel

from prefcls_lib.runtime.files import UserError

SECONDS_BETWEEN_LOOKS = 30
LOOKS_WITHOUT_ANSWER = 20
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


def follow_kernel(kaggle: Kaggle, kernel: Kernel) -> tuple[str, str]:
    """Show a kernel's status and progress until it ends; returns the last status, and Kaggle's message on a failure."""
    kaggle.patience = PATIENCE
    kaggle.left_there = f"{kernel} keeps running on Kaggle: {kernel.page}"
    print(f"{kernel}: {kernel.page}\nCtrl-C leaves it running.", flush=True)
    line, seen, unknown, started = StatusLine(), 0, 0, time.monotonic()
    while unknown < LOOKS_WITHOUT_ANSWER:
        status, failure = kaggle.kernel_status(kernel) or ("unknown", "")
        unknown = unknown + 1 if status in ("unknown", "new_script") else 0
        line.show(status, time.monotonic() - started)
        if status in ENDED:
            line.end()
            kaggle.left_there = f"{kernel} has ended on Kaggle, where its output is kept: {kernel.page}"
            return status, failure
        if status == "running":
            for number, text in enumerate(kaggle.log_lines(kernel)):
                if number >= seen:  # after a lost connection the log comes again from its start
                    seen = number + 1
                    if PROGRESS.search(text):
                        line.show(f"{status} | {text.strip()}", time.monotonic() - started)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    line.end()
    raise UserError(f"{kernel}: its status on Kaggle stays {status}. Look at its page: {kernel.page}")


def explain_failure(kaggle: Kaggle, kernel: Kernel, failure: str) -> str:
    """The last lines of a failed kernel's log, and what to change."""
    tail = "\n  ".join(deque(kaggle.log_lines(kernel), maxlen=20))
    advice = [text for sign, text in ADVICE.items() if re.search(sign, tail + failure)]
    parts = [f"{kernel} failed on Kaggle. {failure}".strip(), f"last lines of its log:\n  {tail or '(there is none)'}"]
    return "\n".join([*parts, *advice, f"its page: {kernel.page}"])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
