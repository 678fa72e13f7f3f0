"""Progress bars: redrawn on a terminal and in a notebook, a line at times in a log."""

import sys
from types import SimpleNamespace

from tqdm import tqdm

SECONDS_IN_LOG = 60


def progress_bar(total: int, label: str, unit: str, shown: bool = True, done: int = 0) -> tqdm:
    """A tqdm bar with pace and time left; `done` of `total` were done earlier and do not count for the pace.

    In a notebook the bar is one display that is updated, so that an executed and exported notebook keeps only its last
    state (with tqdm's own bar for notebooks, its first). A redrawn bar would flood a log: it gets one line a minute.
    """
    where = {"mininterval": 1, "dynamic_ncols": True}
    if "ipykernel" in sys.modules and shown:
        from IPython.display import display

        line = display({"text/plain": ""}, raw=True, display_id=True)
        show = _lines(lambda text: line.update({"text/plain": text}, raw=True))
        where = {"mininterval": 1, "ncols": 100, "ascii": False, "file": show}
    elif not sys.stderr.isatty():
        show = _lines(lambda text: print(text, file=sys.stderr, flush=True))
        where = dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS_IN_LOG) | {"ncols": 100, "file": show}
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=not shown, **where)


def _lines(show):
    """The file that tqdm writes to where it cannot redraw: `show` gets each state of the bar as a line."""
    return SimpleNamespace(write=lambda text: text.strip() and show(text.strip()), flush=lambda: None)
