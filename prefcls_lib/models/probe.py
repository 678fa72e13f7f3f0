"""Which layout of a side suits a reward model: the one in which it ranks most pairs of answers as people did.

A reward model was trained on one layout of its texts, which its checkpoint does not say, and ranks worse in others.
"""

import pandas as pd

from prefcls_lib.data.schema import MARGIN
from prefcls_lib.data.splits import take_rows
from prefcls_lib.data.tokenization import LAYOUTS
from prefcls_lib.models.saved import SavedNetwork

PROBE_ROWS = 400  # decided rows that are scored in each layout: a standard error of .025


def probe_layouts(scorer: SavedNetwork, rows: pd.DataFrame) -> dict:
    """The best of LAYOUTS for a reward model, printed with its numbers.

    Args:
        scorer: from `saved.load_scorer`.
        rows: training rows with labels; at most PROBE_ROWS of the decided ones are used, chosen by content.

    Returns:
        `layout`; `accuracy`: of each layout, the share of the pairs that the scores rank as the votes do; `rows`. Where
        none is above 1/2 by a standard error, and where there are no decided rows, the layout is "pair".
    """
    decided = take_rows(rows[rows["label"] < 2].reset_index(drop=True), PROBE_ROWS, 0)
    if decided.empty:
        return {"layout": "pair", "accuracy": {}, "rows": 0}
    votes, accuracy = decided["label"] == 0, {}
    for layout in LAYOUTS:
        margins = scorer.with_layout(layout).add_margins(decided)[MARGIN]
        accuracy[layout] = float(((margins > 0) == votes).where(margins != 0, 0.5).mean())
    best, error = max(accuracy, key=accuracy.get), 0.5 / len(decided) ** 0.5
    shown = ", ".join(f"{layout} {share:.3f}" for layout, share in accuracy.items())
    print(f"reward model: pairs ranked as voted, by layout: {shown}; {len(decided)} rows, +-{error:.3f}", flush=True)
    if accuracy[best] <= 0.5 + error:
        best = "pair"
        print("reward model: no layout is above chance by its standard error; the layout is pair", flush=True)
    return {"layout": best, "accuracy": accuracy, "rows": len(decided)}
