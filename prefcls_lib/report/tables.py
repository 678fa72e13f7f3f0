"""What the report says of single runs: which backbone, a difference in words, slices, mistakes."""

import html
import re
from pathlib import Path

import pandas as pd

from prefcls_lib.data import loading
from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.finished import Run
from prefcls_lib.evaluation import slices
from prefcls_lib.report.page import signed


def format_difference(values: dict) -> str:
    """A difference of two log losses in a sentence, with its own interval: 0.0164 lower [−0.0255, −0.0072]."""
    side = "lower" if values["difference"] < 0 else "higher"
    return signed(f"{abs(values['difference']):.4f} {side} [{values['low']:+.4f}, {values['high']:+.4f}]")


def backbone_of(run: Run, described: dict[str, dict]) -> str | None:
    """Which of the three backbones a run used: its folder, hub or Kaggle name has one of its names in it."""
    parts = set(Path(str(run.settings.get("init_from") or run.settings["backbone"]).lower()).parts)
    return next((name for name, one in described.items() if parts & set(one["names"])), None)


def slices_of(run: Run, ladder: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """`slices.slice_table` of a run against the ladder: slices known before the vote, and not nearly all rows."""
    shared = rows[rows[ID].isin(set(run.oof.index) & set(ladder.oof.index))].reset_index(drop=True)
    ids = shared[ID]
    table = slices.slice_table(shared, shared["label"].to_numpy(), run.probs(ids), ladder.probs(ids))
    useful = table["difference_low"].notna() & ~table["name"].isin(["tie", "model pair"])
    return table[useful & (table["count"] < 0.9 * len(shared))].reset_index(drop=True)


def mistakes_of(run: Run, rows: pd.DataFrame, count: int) -> str:
    """The wrong predictions with the highest probability, with their texts, as HTML."""
    shared = rows[rows[ID].isin(run.oof.index)].reset_index(drop=True)
    table = slices.most_confident_mistakes(shared, run.probs(shared[ID]), count)
    blocks = []
    for place, line in table.iterrows():
        predicted = ("A wins", "B wins", "tie")[line["predicted"]]
        text = re.sub(r"\n\s*\n", "\n", html.escape(loading.format_row(shared.iloc[place], max_chars=400)))
        blocks.append(
            f'\n<pre class="row">predicted: {predicted}, with probability {line["confidence"]:.0%}\n{text}</pre>\n'
        )
    return "".join(blocks)
