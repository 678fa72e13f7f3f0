"""Run folders and published numbers to report.html and report.pdf; nothing is trained or predicted.

python -m report.build --runs report/runs runs/roberta --out report --readme README.md
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prefcls_lib.data import loading
from prefcls_lib.data.schema import ID
from prefcls_lib.evaluation import calibration, compare, plots, scores, slices
from prefcls_lib.runtime.files import UserError, read_json, reading, write_text
from report import page, tables
from report.read_runs import Found, read_runs

SOURCES = Path(__file__).parent  # template, style, published numbers
STUDIES = SOURCES / "studies"  # what was measured
NO_MAIN = {"sample": None, "main": None, "reliability": "", "slices": None}
README_MARKS = "<!-- results: written by make report -->", "<!-- end of results -->"


def build_report(places: Sequence[Path], out: Path, readme: Path | None = None) -> tuple[Found, list[str]]:
    """Write report.html and report.pdf into `out`, and the result table into `readme`, between its marks.

    Returns what was found, and one line on each thing that could not be made.
    """
    rows, fixed = loading.read_rows(loading.sample_path("train"), labelled=True), _fixed_values()
    fixed |= {
        "facts": loading.describe_rows(rows)["value"].astype(str).str.replace("%", " %").to_dict(),
        "lengths": page.embed_figure(plots.plot_rows(rows), "lengths", "The shipped rows: lengths, and who wins."),
    }
    found = _without_broken(read_runs(places), fixed, rows)
    groups = tables.make_groups(found)
    text = _fill(found, groups, fixed | _main_values(groups, rows))
    style, script = ((SOURCES / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    document = page.make_page(text, style, script)
    write_text(out / "report.html", document)
    problem = page.write_pdf(document, out / "report.pdf")
    if readme is not None:
        _fill_readme(readme, groups, fixed["fold_plans"]["sentence"])
    return found, [problem] if problem else []


def _without_broken(found: Found, fixed: dict, rows: pd.DataFrame) -> Found:
    """Only the runs and blends of which, each by itself, the page can be made: a folder may hold anything."""
    whole, labels = Found([], [], list(found.left_out)), rows.set_index(ID)["label"]
    tries = [(run.path, Found([run], [], [])) for run in found.runs]
    tries += [(blend[1], Found([run for run in found.runs if run.path.resolve() in blend[2]["runs"]], [blend], []))
              for blend in found.blends]  # fmt: skip
    for path, alone in tries:
        try:
            with reading(path, "Copy the run folder, or blend the runs, again."):
                groups = tables.make_groups(alone)
                _fill(alone, groups, fixed | NO_MAIN)
                for run in groups[0].runs if groups and groups[0].on_sample else ():
                    if not run.oof["label"].equals(labels.reindex(run.oof.index)):
                        raise ValueError("oof.csv has other ids or labels than the shipped rows")
            (whole.blends if alone.blends else whole.runs).extend(alone.blends or alone.runs)
        except UserError as error:
            whole.left_out.append((str(path), str(error)))
    return whole


def _fill(found: Found, groups: Sequence[tables.ComparedRuns], values: dict) -> str:
    """The page as Markdown."""
    networks = [run for group in groups for run in group.networks]
    return page.fill_template(SOURCES / "report.md", values | {
        "found": found, "groups": groups, "networks": networks,
        "plain_heads": [run for run in networks if (run.result.get("flip_rate") or 0) > 0.01],
        "trained": [(name, run) for run in networks if (name := tables.backbone_of(run, values["described"]))],
    })  # fmt: skip


def _fixed_values() -> dict:
    """What studies measured and others published, and what the template calls."""
    values = {path.stem: read_json(path) for path in STUDIES.glob("*.json")}
    published = read_json(SOURCES / "published.json")
    prior = published["study"]["prior"]
    return values | {
        "published": published, "study": published["study"], "described": values["specification"]["backbones"],
        "prior_loss": -sum(share * math.log(share) for share in prior), "log": math.log,
        "gpu_check": (STUDIES / "gpu_check.md").read_text(encoding="utf-8").split("\n", 1)[1],
        "describe": tables.describe_run, "signed": page.signed,
        "fit": lambda run: calibration.fit_blend(run.oof["label"].to_numpy(), [run.probs(run.oof.index)]).calibration,
        "compared": lambda values: " | ".join(tables.comparison_cells(compare.Comparison.from_dict(values))),
        "titled": page.embed_table, "table": page.markdown_table, "difference": tables.format_difference,
        "escape": page.escape_text, "uniform": plots.UNIFORM,
        "picture": lambda path, *words: page.embed_figure((SOURCES.parent / path).read_bytes(), *words),
    }  # fmt: skip


def _main_values(groups: Sequence[tables.ComparedRuns], rows: pd.DataFrame) -> dict:
    """What is said of the first network on the shipped rows."""
    sample = groups[0] if groups and groups[0].on_sample else None
    values = NO_MAIN | {"sample": sample}
    if sample is None or not sample.networks:
        return values
    run = sample.networks[0]
    name, labels, probs = page.escape_text(run.name), run.oof["label"].to_numpy(), run.probs(run.oof.index)
    figure = plots.plot_reliability(scores.reliability_table(labels, probs), run.result["expected_calibration_error"])
    caption = f"Confidence of {name} against accuracy on validation rows; numbers of rows above the intervals."
    values |= {
        "main": run,
        "confusion": slices.confusion_matrix(labels, probs),
        "reliability": page.embed_figure(figure, "reliability", caption, "half"),
        "mistakes": tables.mistakes_of(run, rows, 3),
    }
    if sample.ladder is not None:
        table = tables.slices_of(run, sample.ladder, rows)
        caption = f"Log loss of {name} minus that of the baseline, by slice (rows), with 95 % intervals."
        figure = page.embed_figure(plots.plot_slices(table), "slices", caption, "tall")
        clear = table["difference_low"] * table["difference_high"] > 0
        values |= {"slices": figure, "slice_count": len(table), "slices_clear": clear.sum()}
    return values


def _fill_readme(readme: Path, groups: Sequence[tables.ComparedRuns], fold_plans: str) -> None:
    """Put the first group's result table, in its short form, between the marks; of shipped rows, `fold_plans` too."""
    text = readme.read_text(encoding="utf-8")
    start, end = README_MARKS
    if text.count(start) != 1 or text.count(end) != 1 or not groups:
        raise UserError(f"{readme}: needs the lines {start!r} and {end!r} once each, and a run to show.")
    before, rest = text.split(start)
    table = f"{groups[0].title}:\n\n{groups[0].readme_table()}" + f"\n\n{fold_plans}" * groups[0].on_sample
    write_text(readme, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")


def main(argv: list[str] | None = None) -> int:
    """Build the report, and say what was left out; exit code 2 where the user must put something right."""
    parser = argparse.ArgumentParser(prog="report", description="Run folders to report.html and report.pdf.")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIR", default=[SOURCES / "runs"],
                        help="run folders, or folders of them (report/runs)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=SOURCES, metavar="DIR", help="folder to write into (report)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="also put the results between this file's marks")
    arguments = parser.parse_args(argv)
    try:
        found, problems = build_report(arguments.runs, arguments.out, arguments.readme)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for message in [*(f"left out: {name}: {why}" for name, why in found.left_out), *problems]:
        print(message, file=sys.stderr)
    print(f"report of {len(found.runs)} runs and {len(found.blends)} blends: {arguments.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
