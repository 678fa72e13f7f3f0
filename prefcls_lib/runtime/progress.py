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
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=unit,
        disable=not shown,
        file=file,
        mininterval=SECONDS_IN_LOG if in_log else 1,
        maxinterval=SECONDS_IN_LOG if in_log else 10,
        delay=SECONDS_IN_LOG if in_log else 0,
        ascii=False if in_notebook else None,
        ncols=100 if in_notebook or in_log else None,
        dynamic_ncols=not (in_notebook or in_log),
    )


class _Lines:
    """What tqdm writes to, where it cannot redraw: `show` gets one line after the other."""

    def __init__(self, show: Callable[[str], object]):
        self.show = show

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.show(line)

    def flush(self) -> None:
        pass


def _log_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _notebook_line() -> Callable[[str], object]:
    from IPython.display import display

    shown = display({"text/plain": ""}, raw=True, display_id=True)
    return lambda line: shown.update({"text/plain": line}, raw=True)
