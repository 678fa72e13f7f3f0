"""Runs on the same rows, and the blends of them: their tables and their picture in the report."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.data import loading
from prefcls_lib.ensemble.finished import Found, Run, compare_runs, format_verdicts
from prefcls_lib.evaluation import compare, plots
from prefcls_lib.pipeline.folder import FREE_SETTINGS, LADDER_ENTRY
from prefcls_lib.report.page import draw_svg, embed_figure, embed_table, escape_text, markdown_table, signed
from prefcls_lib.runtime.files import sha256

COMPARED = ("difference", "95 % interval", "p", "MDE", "verdict")


def comparison_lines(lines: Sequence[list[str]], comparisons: Sequence[compare.Comparison]) -> list[list[str]]:
    """Lines of a table, each with its comparison in the columns of `COMPARED`; p is corrected for all of them."""
    return [
        [*line, signed(f"{c.difference:+.4f}"), signed(f"{c.low:+.4f} to {c.high:+.4f}"),
         "<0.001" if c.p < 0.001 else f"{c.p:.3f}", f"{c.smallest_detectable:.4f}", c.verdict]
        for line, c in zip(lines, compare.holm_correction(comparisons), strict=True)
    ]  # fmt: skip


def describe_run(run: Run) -> str:
    """A run's name, with the settings of a network that readers ask for first."""
    if run.is_ladder:
        return f"{escape_text(run.name)}: {LADDER_ENTRY}, chosen on other rows"
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
        self.title = f"{rows}, {first.settings['num_folds']} folds by prompt, seed {first.settings['fold_seed']}"

    @property
    def baselines(self) -> list[dict]:
        """The ladder's baselines: of its own run (eight), else those that a network's run fitted."""
        return (self.ladder or self.runs[0]).result.get("ladder", [])

    @property
    def prior(self) -> float | None:
        """Log loss of the class shares on these folds."""
        return next((baseline["log_loss"] for baseline in self.baselines if baseline["rung"] == "prior"), None)

    @cached_property
    def shares(self) -> dict[str, compare.Comparison]:
        """By name, each network that starts from a baseline: its log loss with the encoder, against that without."""
        found = {run.name: compare.Comparison.from_dict(run.result["encoder_share"]) for run in self.networks
                 if run.settings["start_from"] != "none" and "encoder_share" in run.result}  # fmt: skip
        return dict(zip(found, compare.holm_correction(list(found.values())), strict=True))

    @cached_property
    def compared(self) -> dict[Path | str, tuple[compare.Comparison, str]]:
        """Networks (by path) against the ladder, blends (by name) against their best run; the name of the other."""
        compared = {}
        for run in self.networks:
            if self.ladder is not None and (c := compare_runs(run, self.ladder)):
                compared[run.path] = c, escape_text(self.ladder.name)
            elif isinstance(known := run.result.get("comparison"), dict):
                compared[run.path] = compare.Comparison.from_dict(known), LADDER_ENTRY
        for name, content, parts in self.blends:
            best = escape_text(parts[content["best_run"]].name)
            compared[name] = compare.Comparison.from_dict(content["comparison"]), best
        return compared

    def readme_table(self) -> str:
        """The baselines, the first network and its first blend: one line a model, with the verdict in words."""
        lines = [["uniform guess, ln 3", f"{plots.UNIFORM:.4f}", *[""] * 4]]
        lines += [["class shares (prior)", f"{self.prior:.4f}", *[""] * 4]] if self.prior is not None else []
        verdicts = dict(zip(self.compared, format_verdicts(list(self.compared.values())), strict=True))
        for run in [run for run in (self.ladder, *self.networks[:1]) if run is not None]:
            share = signed(self.shares[run.name].describe()) if run.name in self.shares else ""
            lines.append([describe_run(run), *_scores(run.result)[:3], share, verdicts.get(run.path, "")])
        for name, content, parts in sorted(self.blends, key=lambda blend: len(blend[2]))[:1]:
            who = f"{escape_text(name)} of {' and '.join(escape_text(run.name) for run in parts)}, nested"
            lines.append([who, *_scores(content)[:3], "", verdicts[name]])
        header = ("model", "log loss (SD)", "95 % interval", "accuracy", "with the encoder, log loss is", "verdict")
        return markdown_table(header, lines, (0, 5))

    def results_table(self) -> str:
        """Log loss with its interval, accuracy, calibration error: one line a model, the baselines too."""
        lines = [["uniform guess, ln 3", f"{plots.UNIFORM:.4f}", *[""] * 3]]
        lines += [[line["rung"], f"{line['log_loss']:.4f}", format_interval(line["low"], line["high"]),
                   f"{line['accuracy']:.3f}", ""] for line in self.baselines]  # fmt: skip
        for run in self.runs:
            name, settings = describe_run(run).split(": ", 1)
            lines.append([f"**{name}**<br><small>{settings}</small>", *_scores(run.result)])
        for name, content, parts in self.blends:
            who = (
                f"**{escape_text(name)}**<br><small>{', '.join(escape_text(run.name) for run in parts)}; nested</small>"
            )
            lines.append([who, *_scores(content)])
        header = ("model", "log loss (SD)", "95 % interval", "accuracy", "ECE")
        return embed_table(f"results-{self.key}", f"Results: {self.title}.", markdown_table(header, lines), "long")

    def comparisons_table(self) -> str:
        """The networks and blends against the best of what they must beat."""
        keys, found = list(self.compared), list(self.compared.values())
        lines = [[escape_text(Path(key).name), other]
                 for key, (_, other) in zip(keys, found, strict=True)]  # fmt: skip
        lines = comparison_lines(lines, [c for c, _ in found])
        table = markdown_table(("model", "against", *COMPARED), lines, (0, 1, 6))
        return embed_table(f"compared-{self.key}", f"Differences in log loss: {self.title}.", table) if lines else ""

    def draw_results(self) -> Figure:
        """The same as a picture."""
        lines = [{"name": baseline["rung"], "kind": "baseline", **baseline} for baseline in self.baselines]
        entries = [(run.name, "baseline" if run.is_ladder else "network", run.result) for run in self.runs]
        entries += [(name, "blend", content) for name, content, _ in self.blends]
        for name, kind, r in entries:
            low, high = r["log_loss_interval"]
            lines.append({"name": name, "kind": kind, "log_loss": r["log_loss"], "low": low, "high": high})
        return plots.plot_results(pd.DataFrame(lines).set_index("name"))

    def results_figure(self) -> str:
        """`draw_results` inside the page."""
        caption = f"Log loss with 95 % intervals on the same rows: {self.title}."
        return embed_figure(draw_svg(self.draw_results()), f"results-{self.key}", caption)

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
                    who = f"{escape_text(one.name)}, {escape_text(other.name)}"
                    lines.append([f"{escape_text(differ[0])}: {values}<br><small>{who}</small>"])
                    compared.append(c)
        table = markdown_table(("what differs", *COMPARED), comparison_lines(lines, compared), (0, 5))
        caption = f"Networks that differ in one setting, the first minus the second: {self.title}."
        return embed_table(f"ablation-{self.key}", caption, table) if lines else ""

    def shares_table(self) -> str:
        """What the encoder adds to the baseline that each network started from."""
        runs = [run for run in self.networks if run.name in self.shares]
        lines = []
        for run in runs:
            r, alone = run.result, run.result["encoder_only_log_loss"]
            lines.append([escape_text(run.name), run.settings["start_from"], f"{r['baseline_log_loss']:.4f}",
                          f"{r['log_loss']:.4f}", "" if alone is None else f"{alone:.4f}"])  # fmt: skip
        given = [compare.Comparison.from_dict(run.result["encoder_share"]) for run in runs]
        header = ("network", "starts from", "its log loss", "network", "encoder only", *COMPARED)
        table = markdown_table(header, comparison_lines(lines, given), (0, 1, 9))
        caption = f"What the encoder adds: {self.title}."
        return embed_table(f"shares-{self.key}", caption, table) if lines else ""


def make_groups(found: Found) -> list[ComparedRuns]:
    """Runs by the rows they share; the shipped rows first."""
    sample = sha256(loading.sample_path("train"))
    by_key: dict[tuple, list[Run]] = {}
    for run in found.runs:
        by_key.setdefault(run.group, []).append(run)
    groups = [ComparedRuns(runs, found.blends, sample) for runs in by_key.values()]
    groups = sorted(groups, key=lambda group: not group.on_sample)
    for number, group in enumerate(groups, 1):
        group.key = str(number)
    return groups


def _scores(r: dict) -> list[str]:
    spread = [f"{r[name]:.4f}" for name in ("log_loss_fold_sd", "log_loss_seed_sd") if r.get(name) is not None]
    loss = f"{r['log_loss']:.4f}" + (f" ({', '.join(spread)})" if spread else "")
    expected = r.get("expected_calibration_error_if_calibrated")  # not known of an earlier version's blend
    error = f"{r['expected_calibration_error']:.3f}" + ("" if expected is None else f" ({expected:.3f})")
    return [loss, format_interval(*r["log_loss_interval"]), f"{r['accuracy']:.3f}", error]


def format_interval(low: float, high: float) -> str:
    """1.0282 to 1.0758."""
    return f"{low:.4f} to {high:.4f}"
