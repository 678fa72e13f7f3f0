"""Progress bars: on a terminal to stderr, in a notebook one line that is rewritten in place."""

import sys

from tqdm import tqdm


def progress_bar(total: int, label: str, unit: str, shown: bool = True) -> tqdm:
    """A tqdm bar with pace and time left.

    In a notebook the line is one updated display, so that an executed and exported notebook keeps its last state only.
    """
    in_notebook = "ipykernel" in sys.modules
    file = _NotebookLine() if shown and in_notebook else sys.stderr
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        disable=not shown,
        file=file,
        mininterval=1,
        ascii=False if in_notebook else None,
        ncols=100 if in_notebook else None,
        dynamic_ncols=not in_notebook,
    )


class _NotebookLine:
    """What tqdm writes to, where a notebook shows it."""

    def __init__(self):
        from IPython.display import display

        self._display = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._display.update({"text/plain": line}, raw=True)

    def flush(self) -> None:
        pass
