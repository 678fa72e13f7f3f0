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
from prefcls_lib.evaluation import calibration, compare, plots, scores, slices
from prefcls_lib.runtime.files import UserError, read_json, reading, write_text
from report import page, tables
from report.read_runs import Found, read_runs

SOURCES = Path(__file__).parent  # template, style, published numbers
STUDIES = SOURCES / "studies"  # what was measured
README_MARKS = "<!-- results: written by make report -->", "<!-- end of results -->"


def build_report(places: Sequence[Path], out: Path, readme: Path | None = None) -> Found:
    """Write report.html and report.pdf into `out`, and the result table into `readme`, between its marks."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    fixed = _fixed_values(rows)
    found = read_runs(places, rows)
    groups = tables.make_groups(found)
    networks = [run for group in groups for run in group.networks]
    with reading(", ".join(map(str, places)), "Leave out one run after the other to find the one that is broken."):
        text = page.fill_template(SOURCES / "report.md", fixed | _main_values(groups, rows) | {
            "found": found, "groups": groups, "networks": networks,
            "trained": [(name, run) for run in networks if (name := tables.backbone_of(run, fixed["described"]))],
        })  # fmt: skip
    style, script = ((SOURCES / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    document = page.make_page(text, style, script)
    write_text(out / "report.html", document)
    if why := page.write_pdf(document, out / "report.pdf"):
        found.left_out.append((str(out / "report.pdf"), why))
    if readme is not None:
        _fill_readme(readme, groups, fixed["fold_plans"]["sentence"])
    return found


def _fixed_values(rows: pd.DataFrame) -> dict:
    """What studies measured and others published, the shipped rows, and what the template calls."""
    values = {path.stem: read_json(path) for path in STUDIES.glob("*.json")}
    published = read_json(SOURCES / "published.json")
    return values | {
        "published": published, "study": published["study"], "described": values["specification"]["backbones"],
        "prior_loss": -sum(share * math.log(share) for share in published["study"]["prior"]),
        "facts": loading.describe_rows(rows)["value"].astype(str).str.replace("%", " %").to_dict(),
        "lengths": page.embed_figure(plots.plot_rows(rows), "lengths", "The shipped rows: lengths, and who wins."),
        "gpu_check": (STUDIES / "gpu_check.md").read_text(encoding="utf-8").split("\n", 1)[1],
        "describe": tables.describe_run, "signed": page.signed,
        "fit": lambda run: calibration.fit_blend(run.oof["label"].to_numpy(), [run.probs(run.oof.index)]).calibration,
        "compared": lambda values: " | ".join(tables.comparison_cells(compare.Comparison.from_dict(values))),
        "titled": page.embed_table, "table": page.markdown_table, "calibration": calibration, "compare": compare,
        "escape": page.escape_text, "uniform": plots.UNIFORM, "log": math.log,
        "picture": lambda path, *words: page.embed_figure((SOURCES.parent / path).read_bytes(), *words),
    }  # fmt: skip


def _main_values(groups: Sequence[tables.ComparedRuns], rows: pd.DataFrame) -> dict:
    """What is said of the first network on the shipped rows."""
    sample = groups[0] if groups and groups[0].on_sample else None
    values = {"sample": sample, "main": None, "slices": None}
    if sample is None or not sample.networks:
        return values
    run = sample.networks[0]
    name, labels, probs = page.escape_text(run.name), run.oof["label"].to_numpy(), run.probs(run.oof.index)
    figure = plots.plot_reliability(scores.reliability_table(labels, probs), run.result["expected_calibration_error"])
    caption = f"Confidence of {name} against accuracy on validation rows; numbers of rows above the intervals."
    values |= {
        "main": run, "confusion": slices.confusion_matrix(labels, probs),
        "reliability": page.embed_figure(figure, "reliability", caption, "half"),
        "mistakes": tables.mistakes_of(run, rows, 2),
    }  # fmt: skip
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
    default, what = [SOURCES / "runs"], "run folders, or folders of them (report/runs)"
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIR", default=default, help=what)
    parser.add_argument("--out", type=Path, default=SOURCES, metavar="DIR", help="folder to write into (report)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="also put the results between this file's marks")
    arguments = parser.parse_args(argv)
    try:
        found = build_report(arguments.runs, arguments.out, arguments.readme)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for name, why in found.left_out:
        print(f"left out: {name}: {why}", file=sys.stderr)
    print(f"report: {arguments.out / 'report.html'} (runs: {len(found.runs)}, blends: {len(found.blends)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
