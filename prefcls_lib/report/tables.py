"""Tables of the report: the three backbones, the studies, and what is read off single runs."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prefcls_lib.data import loading
from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.finished import COLUMNS, Found, Run
from prefcls_lib.evaluation import calibration, metrics, slices
from prefcls_lib.report.groups import describe_run, format_interval
from prefcls_lib.report.page import embed_table, escape_text, markdown_table, signed


def format_difference(values: dict) -> str:
    """A difference of two log losses in a sentence, with its own interval: 0.0164 lower [−0.0255, −0.0072]."""
    side = "lower" if values["difference"] < 0 else "higher"
    return signed(f"{abs(values['difference']):.4f} {side} [{values['low']:+.4f}, {values['high']:+.4f}]")


def backbone_of(run: Run, described: dict[str, dict]) -> str | None:
    """Which of the three backbones a run used: its folder, hub or Kaggle name has one of its names in it."""
    parts = set(Path(str(run.settings.get("init_from") or run.settings["backbone"]).lower()).parts)
    return next((name for name, one in described.items() if parts & set(one["names"])), None)


def backbone_lines(found: Found, described: dict[str, dict], published: dict) -> list[list[str]]:
    """The three backbones: what was published, and our run, or that there is none yet."""
    lines = []
    for result in published["results"]:
        name = result["backbone"]
        title = described[name]["title"]
        epoch = result["best_epoch"] or "none"
        lines.append([f"{title}, as published", f"{result['smoothed']:.4f}", f"{result['unsmoothed']:.4f}", "",
                      f"{result['accuracy']:.3f}", str(epoch)])  # fmt: skip
        ours = [run for run in found.runs if backbone_of(run, described) == name]
        for run in ours:
            r = run.result
            lines.append([describe_run(run), "", f"{r['log_loss']:.4f}", format_interval(*r["log_loss_interval"]),
                          f"{r['accuracy']:.3f}", f"{r['best_epoch']:.1f}"])  # fmt: skip
        if not ours:
            lines.append([f"{title}, ours", "", "not yet run on Kaggle", "", "", ""])
    return lines


def prediction_table(found: Found, described: dict[str, dict], published: dict) -> str:
    """Probabilities of the competition's three test rows: the published ones, then ours."""
    ids = list(dict.fromkeys(line["id"] for line in published["predictions"]))
    entries: dict[str, dict] = {}
    for line in published["predictions"]:
        entries.setdefault(f"{described[line['backbone']]['title']}, published", {})[line["id"]] = line["probs"]
    for run in found.runs:
        entries[escape_text(run.name)] = {row: run.submission.loc[row, COLUMNS] for row in ids
                                          if row in run.submission.index}  # fmt: skip
    lines = [[who, *(" / ".join(f"{float(p):.3f}" for p in probs[row]) if row in probs else "" for row in ids)]
             for who, probs in entries.items() if probs]  # fmt: skip
    header = ("A wins / B wins / tie", *(f"row {row}" for row in ids))
    return embed_table("predictions", "Predictions for three test rows.", markdown_table(header, lines), "long")


def floor_table(floors: dict[str, list[dict]]) -> str:
    """The experiments whose Bayes log loss is known, by their number of rows."""
    lines = [
        [f"{int(rows):,}", escape_text(line["variant"]), f"{line['log_loss']:.4f}", f"{line['floor']:.4f}",
         f"{line['prior']:.4f}", f"{line['structure_logistic']:.4f}", f"{line['encoder_spread']:.4f}",
         "yes" if line["collapsed"] else "no"]
        for rows, variants in floors.items() for line in variants
    ]  # fmt: skip
    header = ("rows", "variant", "log loss", "Bayes", "class shares", "structure alone", "encoder spread", "collapsed")
    return embed_table("floor", "Known Bayes log loss: ELECTRA of 24 layers.", markdown_table(header, lines, (1, 7)))


def curve_lines(curves: Sequence[dict]) -> list[dict]:
    """The learning curve in numbers: for each curve and number of rows, means and ranges over the seeds."""
    points = [(curve, point) for curve in curves for point in curve["points"]]
    corrected = metrics.holm_correction([metrics.Comparison.from_dict(point["comparison"]) for _, point in points])
    lines: dict[tuple, dict] = {}
    for (curve, point), c in zip(points, corrected, strict=True):
        key = curve["source"], curve["backbone"], point["rows"]
        line = lines.setdefault(key, {**curve, "rows": point["rows"], "losses": [], "found": []})
        line["losses"].append(point["log_loss"])
        line["found"].append(c)
    for line in lines.values():
        line["log_loss"] = pd.DataFrame(line["losses"]).mean()
        differences = [c.difference for c in line["found"]]
        low, high = (line["found"][0].low, line["found"][0].high) if len(differences) == 1 else (
            min(differences), max(differences))  # fmt: skip
        line |= {"difference": sum(differences) / len(differences), "low": low, "high": high}
    return list(lines.values())


def curve_table(lines: Sequence[dict]) -> str:
    """`curve_lines` as a table."""
    names = ("prior", "structure_logistic", "baseline", "network")
    cells = []
    for line in lines:
        verdicts = [c.verdict for c in line["found"]]
        who = f"{line['title']}, {escape_text(line['backbone'])}".replace(" ", "\u00a0")
        cells.append([who, f"{line['rows']:,}", str(len(verdicts)),
                      *(f"{line['log_loss'][name]:.4f}" for name in names), signed(f"{line['difference']:+.4f}"),
                      signed(f"{line['low']:+.4f} to {line['high']:+.4f}"),
                      f"{verdicts.count('BEATS')} / {verdicts.count('LOSES')}"])  # fmt: skip
    header = ("votes, network", "rows", "seeds", "class shares", "structure logistic", "its baseline", "network",
              "difference", "range", "BEATS / LOSES")  # fmt: skip
    caption = ("Learning curve: means over seeds, and the network minus its baseline (range: of the seeds; of a single "
               "seed the 95 % interval).")  # fmt: skip
    return embed_table("curve", caption, markdown_table(header, cells))


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


def percent(share: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * share:.1f} %"


def minutes(seconds: float) -> str:
    """1,234 s as 20.6 min."""
    return f"{seconds / 60:,.1f} min"


def bias_table(runs: Sequence[Run]) -> str:
    """How often a network's verdict changes when the answers change places."""
    lines = []
    for run in runs:
        if run.result.get("flip_rate") is not None:
            folds = [fold["flip_rate"] for fold in run.result.get("folds", [])]
            between = f"{percent(min(folds))} to {percent(max(folds))}" if folds else ""
            name = escape_text(run.name)
            lines.append([name, str(run.settings.get("head")), percent(run.result["flip_rate"]), between])
    table = markdown_table(("run", "head", "verdicts that flip", "between folds"), lines, (0, 1))
    return embed_table("bias", "Verdicts that change when the answers change places.", table)


def calibration_table(runs: Sequence[Run]) -> str:
    """Log loss and ECE as they are and after a calibration fitted on other folds; the calibration itself."""
    lines = []
    for run in runs:
        r, fitted = run.result, calibration.fit_calibration(run.oof["label"].to_numpy(), run.probs(run.oof.index))
        numbers = [f"{r[name]:.4f}" for error in ("log_loss", "expected_calibration_error")
                   for name in (error, f"calibrated_{error}")]  # fmt: skip
        name = escape_text(run.name)
        lines.append([name, *numbers, f"{fitted.temperature:.2f}", signed(f"{fitted.tie_bias:+.2f}")])
    header = ("run", "log loss", "calibrated", "ECE", "calibrated", "temperature", "tie bias")
    caption = "Before and after a calibration that was fitted on other folds."
    return embed_table("calibration", caption, markdown_table(header, lines))


def speed_table(runs: Sequence[Run]) -> str:
    """Pace, padding and time of the networks, with the machine and how loaded it was."""
    lines = []
    for run in runs:
        r = run.result
        if r.get("tokens_per_second"):
            shares = [percent(r[name]) for name in ("useful_token_share", "predict_useful_token_share")]
            machine = escape_text(str(r.get("versions", {}).get("machine", "?"))).replace(" ", "\u00a0")
            pace, load = f"{r['tokens_per_second']:,.0f}", r.get("load_average")
            loads = " to ".join(f"{value:.1f}" for value in load or () if value is not None)
            lines.append([escape_text(run.name), machine, loads, pace, *shares, minutes(r["seconds"])])
    header = ("run", "machine", "load", "tokens/s", "useful, training", "predicting", "time")
    caption = (
        "Pace of the runs. “Useful” is the share of computed tokens that are not padding, “time” that of the whole "
        "command, “load” the machine's load average at its start and end, where it was recorded: above the number "
        "of threads, other work slowed the run."
    )
    return embed_table("pace", caption, markdown_table(header, lines, (0, 1, 2)))
