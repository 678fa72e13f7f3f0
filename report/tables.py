"""Tables and pictures of the report: runs on the same rows and their blends, and what is said of a single run."""

import html
import re
from functools import cached_property
from itertools import combinations
from pathlib import Path

import pandas as pd

from prefcls_lib.data import loading
from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.blend import MIN_SHARED_ROWS, Run, shared_ids
from prefcls_lib.evaluation import compare, plots, slices
from prefcls_lib.pipeline.folder import FREE_SETTINGS
from prefcls_lib.runtime.files import printable, sha256
from report.page import embed_figure, embed_table, escape_text, markdown_table, signed
from report.read_runs import Found

CLASSES = ("A wins", "B wins", "tie")
COMPARED = ("difference", "95 % interval", "p", "MDE", "verdict")
UNIFORM = ["uniform guess, ln 3", f"{plots.UNIFORM:.4f}"]


class ComparedRuns:
    """Runs on the same rows, and the blends of them; `key` names the group in references to its tables."""

    def __init__(self, key: str, runs: list[Run], found: Found, on_sample: bool):
        self.key, self.runs, self.on_sample = key, runs, on_sample
        self.networks = [run for run in runs if run.share is not None]
        self.ladder = next((run for run in runs if run.share is None), None)
        baselines = (self.ladder or runs[0]).result["baselines"]  # the ladder has all of them
        self.baselines = [line | {"log_loss_interval": (line["low"], line["high"])} for line in baselines]
        self.prior = next((line["log_loss"] for line in self.baselines if line["model"] == "prior"), None)
        at = {run.path.resolve(): run for run in runs}
        self.blends = [(name, content, parts) for name, content in found.blends
                       if all(parts := [at.get(run) for run in content["runs"]])]  # fmt: skip
        rows = f"{runs[0].result['rows']:,} " + ("shipped rows" if on_sample else "rows")
        plan = runs[0].settings
        self.title = f"{rows}, {plan.num_folds} folds by prompt, seed {plan.fold_seed}"

    @cached_property
    def compared(self) -> dict[Path | str, tuple[compare.Comparison, str]]:
        """Networks (by path) against their baseline, blends (by name) against their best run; the name of the other.

        p is corrected for all of them.
        """
        found = {run.path: (run.share, escape_text(run.result["baseline"])) for run in self.networks}
        found |= {name: (content["comparison"], escape_text(parts[content["best_run"]].name))
                  for name, content, parts in self.blends}  # fmt: skip
        corrected = compare.holm_correction([c for c, _ in found.values()])
        return {key: (c, other) for (key, (_, other)), c in zip(found.items(), corrected, strict=True)}

    def readme_table(self) -> str:
        """The prior, the first network with its baseline, and its first blend."""
        wanted, nothing = ["prior", *(run.result["baseline"] for run in self.networks[:1])], [""] * len(COMPARED)
        lines = [[*UNIFORM, "", "", *nothing]]
        for line in (line for line in self.baselines if line["model"] in wanted):
            lines.append([escape_text(line["model"]), *_scores(line)[:3], *nothing])
        for run in self.networks[:1]:
            lines.append([describe_run(run), *_scores(run.result)[:3], *comparison_cells(*self.compared[run.path])])
        for name, content, parts in sorted(self.blends, key=lambda blend: len(blend[2]))[:1]:
            who = f"{escape_text(name)} of {' and '.join(escape_text(run.name) for run in parts)}, nested"
            lines.append([who, *_scores(content)[:3], *comparison_cells(*self.compared[name])])
        return markdown_table(("model", "log loss (SD)", "95 % interval", "accuracy", *COMPARED), lines, (0, 8))

    def results_table(self) -> str:
        """Log loss with its interval, accuracy, calibration error: one line a model, the baselines too."""
        lines = [[*UNIFORM, "", "", ""], *([escape_text(line["model"]), *_scores(line)] for line in self.baselines)]
        for run in self.networks:
            name, settings = describe_run(run).split(": ", 1)
            lines.append([f"**{name}**<br><small>{settings}</small>", *_scores(run.result)])
        for name, content, parts in self.blends:
            who = ", ".join(escape_text(run.name) for run in parts)
            lines.append([f"**{escape_text(name)}**<br><small>{who}; nested</small>", *_scores(content)])
        header = ("model", "log loss (SD)", "95 % interval", "accuracy", "ECE")
        return embed_table(f"results-{self.key}", f"Results: {self.title}.", markdown_table(header, lines), "long")

    def comparisons_table(self) -> str:
        """What the encoder adds to each network's baseline, and what a blend adds to its best run."""
        alone = {run.path: run.result.get("encoder_only_log_loss") for run in self.networks}
        lines = []
        for key, (c, other) in self.compared.items():
            who = f"{escape_text(Path(key).name)}<br><small>against {other}</small>"
            lines.append([who, f"{alone[key]:.4f}" if alone.get(key) else "", *comparison_cells(c)])
        table = markdown_table(("model", "encoder only", *COMPARED), lines, (0, 6))
        return embed_table(f"compared-{self.key}", f"Differences in log loss: {self.title}.", table) if lines else ""

    def results_figure(self) -> str:
        """The same as a picture."""
        shown = [(line["model"], "baseline", line) for line in self.baselines]
        shown += [(run.name, "network", run.result) for run in self.networks]
        shown += [(name, "blend", content) for name, content, _ in self.blends]
        lines = [(kind, result["log_loss"], *result["log_loss_interval"]) for _, kind, result in shown]
        names = [printable(name)[:60] for name, *_ in shown]
        figure = plots.plot_results(pd.DataFrame(lines, names, ["kind", "log_loss", "low", "high"]))
        return embed_figure(figure, f"results-{self.key}", f"Log loss with 95 % intervals: {self.title}.")

    def ablation_table(self) -> str:
        """Networks that differ in one setting, compared row by row; p is of all these comparisons."""
        found = {}
        for one, other in combinations(self.networks, 2):
            ours, theirs = one.settings.to_dict(), other.settings.to_dict()
            differ = [name for name in ours if name not in FREE_SETTINGS and ours[name] != theirs[name]]
            ids = shared_ids((one, other))
            rows = one.oof.loc[ids]
            if len(differ) == 1 and len(ids) >= MIN_SHARED_ROWS and rows["group"].nunique() > 1:
                labels, prompts = rows["label"].to_numpy(), rows["group"].to_numpy()
                c = compare.compare(labels, one.probs(ids), other.probs(ids), prompts)
                values = " against ".join(escape_text(str(settings[differ[0]])) for settings in (ours, theirs))
                who = f"{escape_text(one.name)}, {escape_text(other.name)}"
                found[f"{escape_text(differ[0])}: {values}<br><small>{who}</small>"] = c
        corrected = compare.holm_correction(list(found.values()))
        lines = [[who, *comparison_cells(c)] for who, c in zip(found, corrected, strict=True)]
        table = markdown_table(("what differs", *COMPARED), lines, (0, 5))
        caption = f"Networks that differ in one setting, the first minus the second: {self.title}."
        return embed_table(f"ablation-{self.key}", caption, table) if lines else ""


def make_groups(found: Found) -> list[ComparedRuns]:
    """Runs by the rows they share; the shipped rows first."""
    sample, by_key = sha256(loading.sample_path("train")), {}
    for run in found.runs:
        by_key.setdefault(run.group, []).append(run)
    ordered = sorted(by_key.items(), key=lambda item: item[0][0] != sample)
    return [ComparedRuns(str(n), runs, found, key[0] == sample) for n, (key, runs) in enumerate(ordered, 1)]


def describe_run(run: Run) -> str:
    """A network's name, with the settings that readers ask for first."""
    s = run.settings
    name = escape_text(Path(str(s.init_from or s.backbone)).name)
    parts = [f"reward model {name}" if s.init_from else f"backbone {name}",
             "cross-encoder" if s.architecture == "cross" else f"{s.head} head", f"{s.max_length} tokens",
             *(["extra rows"] if s.extra_train else []),
             *([f"on {s.start_from}"] if s.start_from != "none" else [])]  # fmt: skip
    return f"{escape_text(run.name)}: {', '.join(parts)}"


def backbone_of(run: Run, described: dict[str, dict]) -> str | None:
    """Which of the three backbones a run used: its folder, hub or Kaggle name has one of its names in it."""
    parts = set(Path(str(run.settings.init_from or run.settings.backbone).lower()).parts)
    return next((name for name, one in described.items() if parts & set(one["names"])), None)


def slices_of(run: Run, baseline: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """`slices.slice_table` of a run against a baseline's: slices known before the vote, and not nearly all rows."""
    shared = rows[rows[ID].isin(set(run.oof.index) & set(baseline.oof.index))].reset_index(drop=True)
    table = slices.slice_table(shared, shared["label"].to_numpy(), run.probs(shared[ID]), baseline.probs(shared[ID]))
    useful = table["difference_low"].notna() & ~table["name"].isin(["tie", "model pair"])
    return table[useful & (table["count"] < 0.9 * len(shared))].reset_index(drop=True)


def mistakes_of(run: Run, rows: pd.DataFrame, count: int) -> str:
    """The wrong predictions with the highest probability, with their texts, as HTML."""
    shared = rows[rows[ID].isin(run.oof.index)].reset_index(drop=True)
    table = slices.most_confident_mistakes(shared, run.probs(shared[ID]), count)
    blocks = []
    for place, line in table.iterrows():
        text = re.sub(r"\n\s*\n", "\n", html.escape(loading.format_row(shared.iloc[place], max_chars=250)))
        said = f"predicted: {CLASSES[line['predicted']]}, with probability {line['confidence']:.0%}"
        blocks.append(f'\n<pre class="row">{said}\n{text}</pre>\n')
    return "".join(blocks)


def comparison_cells(c: compare.Comparison, other: str = "") -> list[str]:
    """The columns of `COMPARED`; the verdict with the name of the other, if it has one."""
    return [signed(f"{c.difference:+.4f}"), signed(f"{c.low:+.4f} to {c.high:+.4f}"),
            "<0.001" if c.p < 0.001 else f"{c.p:.3f}", f"{c.smallest_detectable:.4f}",
            c.against(other) if other else c.verdict]  # fmt: skip


def _scores(r: dict) -> list[str]:
    spread = [f"{r[name]:.4f}" for name in ("log_loss_fold_sd", "log_loss_seed_sd") if r.get(name) is not None]
    loss = f"{r['log_loss']:.4f}" + (f" ({', '.join(spread)})" if spread else "")
    low, high = r["log_loss_interval"]
    error = ""
    if "expected_calibration_error" in r:  # else a baseline's
        error = f"{r['expected_calibration_error']:.3f} ({r['expected_calibration_error_if_calibrated']:.3f})"
    return [loss, f"{low:.4f} to {high:.4f}", f"{r['accuracy']:.3f}", error]
