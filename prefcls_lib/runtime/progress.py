"""Progress bars: redrawn on a terminal and in a notebook, a line at times in a log."""

import sys
from collections.abc import Callable

from tqdm import tqdm

SECONDS_IN_LOG = 60


def progress_bar(total: int, label: str, unit: str, shown: bool = True, done: int = 0) -> tqdm:
    """A tqdm bar with pace and time left; `done` of `total` were done earlier and do not count for the pace.

    In a notebook the line is one updated display, so that an executed and exported notebook keeps its last state only.
    Where stderr is a file or a pipe, a bar that is redrawn would fill it: there a line comes at most once a minute.
    """
    in_notebook = "ipykernel" in sys.modules
    in_log = not in_notebook and not sys.stderr.isatty()
    file = _Lines(_notebook_line() if in_notebook else _log_line) if shown and (in_notebook or in_log) else sys.stderr
    seconds, redrawn = SECONDS_IN_LOG if in_log else 1, not (in_notebook or in_log)
    return tqdm(
        total=total, initial=done, desc=label, unit=unit, disable=not shown, file=file, mininterval=seconds,
        maxinterval=max(seconds, 10), delay=seconds if in_log else 0, ascii=False if in_notebook else None,
        ncols=None if redrawn else 100, dynamic_ncols=redrawn,
    )  # fmt: skip


class _Lines:
    """What tqdm writes to, where it cannot redraw: `show` gets one line after the other."""

    def __init__(self, show: Callable[[str], object]):
        self.show = show

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.show(line)

    def flush(self) -> None:
        pass


def _log_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _notebook_line() -> Callable[[str], object]:
    from IPython.display import display

    shown = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda line: shown.update({"text/plain": line}, raw=True)
