"""Tables and figures of the report: runs on the same rows, the three backbones, and what is read off one run."""

import html
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.data import loading
from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.finished import COLUMNS, Found, Run, compare_runs, format_verdicts
from prefcls_lib.evaluation import calibration, metrics, plots, slices
from prefcls_lib.pipeline.folder import FREE_SETTINGS
from prefcls_lib.report.page import draw_svg, embed_figure, escape_text, markdown_table
from prefcls_lib.runtime.files import sha256


def describe_run(run: Run) -> str:
    """A run's name, with the settings of a network that readers ask for first."""
    if run.is_ladder:
        return f"{escape_text(run.name)}: the best baseline, chosen on other rows"
    s = run.settings
    parts = [
        ("reward model " if s["init_from"] else "backbone ")
        + escape_text(Path(str(s["init_from"] or s["backbone"])).name),
        "cross-encoder" if s["architecture"] == "cross" else f"{s['head']} head",
        "structure features" if s["structure_features"] else "no structure features",
        f"{s['max_length']} tokens",
        *(["extra rows"] if s["extra_train"] else []),
        *([f"on {s['start_from']}"] if s["start_from"] != "none" else []),
    ]
    return f"{escape_text(run.name)}: {', '.join(parts)}"


class ComparedRuns:
    """Runs on the same rows, and the blends of them."""

    def __init__(self, runs: list[Run], blends: list[tuple[str, Path, dict]], sample_sha256: str):
        self.runs = runs
        self.ladder = next((run for run in runs if run.is_ladder), None)
        self.networks = [run for run in runs if not run.is_ladder]
        at = {run.path.resolve(): run for run in runs}
        blended = [(name, content, [at.get((path.parent / run).resolve()) for run in content["runs"]])
                   for name, path, content in blends]  # fmt: skip
        self.blends = [(name, content, parts) for name, content, parts in blended if parts and all(parts)]
        first = runs[0]
        self.on_sample = first.result["data_sha256"]["train"] == sample_sha256
        rows = f"{first.result['rows']:,} " + ("shipped rows" if self.on_sample else "rows")
        self.title = f"{rows}, {first.settings['num_folds']} folds by prompt, seed {first.settings['seed']}"

    @property
    def baselines(self) -> list[dict]:
        """The ladder's baselines: of its own run (seven), else those that a network's run fitted."""
        return (self.ladder or self.runs[0]).result.get("ladder", [])

    @property
    def prior(self) -> float | None:
        """Log loss of the class shares on these folds."""
        return next((baseline["log_loss"] for baseline in self.baselines if baseline["rung"] == "prior"), None)

    @cached_property
    def shares(self) -> dict[str, str]:
        """By name, each network that starts from a baseline: its log loss with the encoder, against that without."""
        found = {run.name: metrics.Comparison.from_dict(run.result["encoder_share"]) for run in self.networks
                 if run.settings["start_from"] != "none" and "encoder_share" in run.result}  # fmt: skip
        corrected = metrics.holm_correction(list(found.values()))
        return {name: c.describe().replace("-", "−") for name, c in zip(found, corrected, strict=True)}

    @cached_property
    def verdicts(self) -> dict[Path | str, str]:
        """Of networks (by path) against the ladder, of blends (by name) against their best run."""
        compared = {}
        for run in self.networks:
            if self.ladder is not None and (c := compare_runs(run, self.ladder)):
                compared[run.path] = c, escape_text(self.ladder.name)
            elif isinstance(known := run.result.get("comparison"), dict):
                compared[run.path] = metrics.Comparison.from_dict(known), "the best baseline"
        for name, content, parts in self.blends:
            best = escape_text(parts[content["best_run"]].name)
            compared[name] = metrics.Comparison.from_dict(content["comparison"]), best
        return dict(zip(compared, format_verdicts(list(compared.values())), strict=True))

    def results_table(self, short: bool = False) -> str:
        """Log loss with interval, accuracy, calibration, best epoch, time, verdict: one line a model.

        Args:
            short: for README: the baselines, the first network and its first blend, and what its encoder adds.
        """
        runs = [run for run in self.runs if run.is_ladder or run is self.networks[0]] if short else self.runs
        blends = sorted(self.blends, key=lambda blend: len(blend[2]))[:1] if short else self.blends
        lines = [["uniform guess, ln 3", "", f"{plots.UNIFORM:.4f}", *[""] * 7]]
        if self.prior is not None:
            lines.append(["class shares (prior)", "", f"{self.prior:.4f}", *[""] * 7])
        for run in runs:
            r = run.result
            epoch = "" if r.get("best_epoch") is None else f"{r['best_epoch']:.1f}"
            added, verdict = self.shares.get(run.name, ""), self.verdicts.get(run.path, "")
            scores = _scores(r, r["valid_rows"])
            lines.append([describe_run(run), *scores, added, epoch, minutes(r["seconds"]), verdict])
        for name, content, parts in blends:
            who = f"{escape_text(name)} of {' and '.join(escape_text(run.name) for run in parts)}, nested"
            lines.append([who, *_scores(content, content["rows"]), "", "", "", self.verdicts[name]])
        header = ("model", "rows", "log loss (SD)", "95 % interval", "accuracy", "ECE (if calibrated)",
                  "with the encoder, log loss is", "best epoch", "time", "verdict")  # fmt: skip
        kept = [0, 2, 3, 4, 6, 9] if short else [0, 1, 2, 3, 4, 5, 7, 8, 9]
        header, *lines = ([line[i] for i in kept] for line in (header, *lines))
        return markdown_table(header, lines, (0, len(header) - 1))

    def draw_results(self) -> Figure:
        """The same as a picture, with every baseline."""
        lines = [{"name": baseline["rung"], "kind": "baseline", **baseline} for baseline in self.baselines]
        entries = [(run.name, "baseline" if run.is_ladder else "network", run.result) for run in self.runs]
        entries += [(name, "blend", content) for name, content, _ in self.blends]
        for name, kind, r in entries:
            low, high = r["log_loss_interval"]
            lines.append({"name": name, "kind": kind, "log_loss": r["log_loss"], "low": low, "high": high})
        return plots.plot_results(pd.DataFrame(lines), self.prior)

    def results_figure(self) -> str:
        """`draw_results` inside the page."""
        return embed_figure(draw_svg(self.draw_results()), "Log loss on the same validation rows, not sorted by it.")

    def baselines_table(self) -> str:
        """Every baseline of the ladder."""
        lines = [
            [r["rung"], f"{r['log_loss']:.4f}", _interval(r["low"], r["high"]), f"{r['accuracy']:.3f}"]
            for r in self.baselines
        ]
        return markdown_table(("baseline", "log loss", "95 % interval", "accuracy"), lines)

    def ablation_table(self) -> str:
        """Every two networks that differ in one setting."""
        lines, compared = [], []
        for place, one in enumerate(self.networks):
            for other in self.networks[place + 1 :]:
                names = sorted(set(one.settings) - set(FREE_SETTINGS))
                differ = [name for name in names if one.settings[name] != other.settings[name]]
                if "architecture" in differ and "max_length" in differ:  # of one answer, or of both
                    differ.remove("max_length")
                if len(differ) == 1 and (c := compare_runs(one, other)):
                    values = " against ".join(escape_text(str(run.settings.get(differ[0]))) for run in (one, other))
                    lines.append([f"{escape_text(one.name)}: {differ[0]} {values}", f"{c.rows:,}"])
                    compared.append((c, escape_text(other.name)))
        lines = [[*line, verdict] for line, verdict in zip(lines, format_verdicts(compared), strict=True)]
        return markdown_table(("what differs", "rows", "verdict"), lines, (0, 2)) if lines else ""


def make_groups(found: Found) -> list[ComparedRuns]:
    """Runs by the rows they share; the shipped rows first."""
    sample = sha256(loading.sample_path("train"))
    by_key: dict[tuple, list[Run]] = {}
    for run in found.runs:
        by_key.setdefault(run.group, []).append(run)
    groups = [ComparedRuns(runs, found.blends, sample) for runs in by_key.values()]
    return sorted(groups, key=lambda group: (not group.on_sample, group.title))


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
            lines.append([describe_run(run), "", f"{r['log_loss']:.4f}", _interval(*r["log_loss_interval"]),
                          f"{r['accuracy']:.3f}", f"{r['best_epoch']:.1f}"])  # fmt: skip
        if not ours:
            lines.append([f"{title}, ours", "", "not yet run on Kaggle", "", "", ""])
    return lines


def prediction_lines(found: Found, described: dict[str, dict], published: dict) -> list[list[str]]:
    """Probabilities of the competition's three test rows: the published ones, then ours."""
    lines = []
    for row_id in dict.fromkeys(line["id"] for line in published["predictions"]):
        entries = [(f"{described[line['backbone']]['title']}, published", line["probs"])
                   for line in published["predictions"] if line["id"] == row_id]  # fmt: skip
        entries += [(escape_text(run.name), run.submission.loc[row_id, COLUMNS])
                    for run in found.runs if row_id in run.submission.index]  # fmt: skip
        lines += [[row_id, who, *(f"{float(p):.3f}" for p in probs)] for who, probs in entries]
    return lines


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
        text = html.escape(loading.format_row(shared.iloc[place], max_chars=500)).replace("\n\n", "\n&nbsp;\n")
        blocks.append(
            f'\n<pre class="row">predicted: {predicted}, with probability {line["confidence"]:.0%}\n{text}</pre>\n'
        )
    return "".join(blocks)


def minutes(seconds: float) -> str:
    """1,234 s as 20.6 min."""
    return f"{seconds / 60:,.1f} min"


def _scores(r: dict, rows: int) -> list[str]:
    spread = [f"{r[name]:.4f}" for name in ("log_loss_fold_sd", "log_loss_seed_sd") if r.get(name) is not None]
    loss = f"{r['log_loss']:.4f}" + (f" ({', '.join(spread)})" if spread else "")
    expected = r.get("expected_calibration_error_if_calibrated")  # not known of an earlier version's blend
    error = f"{r['expected_calibration_error']:.3f}" + ("" if expected is None else f" ({expected:.3f})")
    return [f"{rows:,}", loss, _interval(*r["log_loss_interval"]), f"{r['accuracy']:.3f}", error]


def _interval(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}"


def bias_table(runs: Sequence[Run]) -> str:
    """How often a network's verdict changes when the answers change places."""
    lines = []
    for run in runs:
        if run.result.get("flip_rate") is not None:
            folds = [fold["flip_rate"] for fold in run.result.get("folds", [])]
            between = f"{min(folds):.1%} to {max(folds):.1%}" if folds else ""
            name = escape_text(run.name)
            lines.append([name, str(run.settings.get("head")), f"{run.result['flip_rate']:.1%}", between])
    return markdown_table(("run", "head", "verdicts that flip", "folds"), lines, (0, 1))


def calibration_table(runs: Sequence[Run]) -> str:
    """Log loss and ECE as they are and after a calibration fitted on other folds; the calibration itself."""
    lines = []
    for run in runs:
        r, fitted = run.result, calibration.fit_calibration(run.oof["label"].to_numpy(), run.probs(run.oof.index))
        numbers = [f"{r[name]:.4f}" for error in ("log_loss", "expected_calibration_error")
                   for name in (error, f"calibrated_{error}")]  # fmt: skip
        name = escape_text(run.name)
        lines.append([name, *numbers, f"{fitted.temperature:.2f}", f"{fitted.tie_bias:+.2f}".replace("-", "−")])
    header = ("run", "log loss", "calibrated", "ECE", "calibrated", "temperature", "tie bias")
    return markdown_table(header, lines)


def speed_table(runs: Sequence[Run]) -> str:
    """Pace, padding and time of the networks, with the machine."""
    lines = []
    for run in runs:
        r = run.result
        if r.get("tokens_per_second"):
            shares = [f"{r[name]:.1%}" for name in ("useful_token_share", "predict_useful_token_share")]
            machine = escape_text(str(r.get("versions", {}).get("machine", "?")))
            pace = f"{r['tokens_per_second']:,.0f}"
            lines.append([escape_text(run.name), machine, pace, *shares, minutes(r["seconds"])])
    header = ("run", "machine", "tokens a second", "useful, training", "useful, predicting", "whole command")
    return markdown_table(header, lines, (0, 1))
