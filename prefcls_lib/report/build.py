"""The report: run folders and published numbers in, report.html and report.pdf out; nothing is trained or predicted."""

import math
from collections.abc import Sequence
from pathlib import Path

from prefcls_lib.data import loading
from prefcls_lib.ensemble.finished import Found, read_runs
from prefcls_lib.evaluation import calibration, compare, plots, scores
from prefcls_lib.report.groups import ComparedRuns, describe_run, make_groups
from prefcls_lib.report.page import (
    draw_svg,
    embed_figure,
    embed_table,
    escape_text,
    fill_template,
    make_page,
    markdown_table,
    signed,
    write_pdf,
)
from prefcls_lib.report.tables import backbone_of, format_difference, mistakes_of, slices_of
from prefcls_lib.runtime.files import UserError, read_json, write_text

SOURCES = Path(__file__).resolve().parents[2] / "report"  # template, style, published numbers: in the repository only
STUDIES = SOURCES / "studies"  # what was measured
README_MARKS = "<!-- results: written by make report -->", "<!-- end of results -->"


def build_report(places: Sequence[Path], out: Path, readme: Path | None = None) -> tuple[Found, list[str]]:
    """Write report.html, report.pdf and results.svg into `out`; the result table into `readme`, between its marks.

    Returns:
        What was found, and one line on each thing that could not be made.

    Raises:
        UserError: a place, the template, or what it needs is missing.
    """
    found = read_runs(places)
    groups = make_groups(found)
    networks = [run for group in groups for run in group.networks]
    values = {"found": found, "groups": groups, **_published_values(), **_study_values(), **_row_values(groups)}
    described = values["described"]
    values |= {
        "names": {run.name for run in found.runs}, "networks": networks,
        "plain_heads": [run for run in networks if (run.result.get("flip_rate") or 0) > 0.01],
        "trained": [(name, run) for run in found.runs if (name := backbone_of(run, described))],
        "describe": describe_run, "signed": signed,
        "fit": lambda run: calibration.fit_calibration(run.oof["label"].to_numpy(), run.probs(run.oof.index)),
        "compared": lambda values: signed(compare.Comparison.from_dict(values).describe()),
        "titled": embed_table, "difference": format_difference, "escape": escape_text, "uniform": plots.UNIFORM,
        "picture": lambda path, *words: embed_figure((SOURCES.parent / path).read_bytes(), *words),
    }  # fmt: skip
    style, script = ((SOURCES / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    page = make_page(fill_template(SOURCES / "report.md", values), style, script)
    write_text(out / "report.html", page)
    problem = write_pdf(page, out / "report.pdf")
    if groups:
        write_text(out / "results.svg", draw_svg(groups[0].draw_results()).decode())
    if readme is not None:
        _fill_readme(readme, groups, values["fold_plans"])
    return found, [problem] if problem else []


def _study_values() -> dict:
    """What the studies measured; the learning curve only where its file is there."""
    path, remedies = STUDIES / "curve.json", read_json(STUDIES / "known_floor_remedies.json")
    return {
        **{name: read_json(STUDIES / f"{name}.json") for name in ("orders", "sorting", "encoding", "more_rows")},
        "fold_plans": read_json(STUDIES / "fold_plans.json")["sentence"],
        "benchmark": read_json(STUDIES / "benchmark" / "benchmark.json"),
        "gpu_check": (STUDIES / "gpu_check.md").read_text(encoding="utf-8").split("\n", 1)[1],
        "fewer_rows": {line["variant"]: line for line in read_json(STUDIES / "known_floor_12000_rows.json")},
        "remedies": {name: [line for line in remedies if line["variant"] == name]
                     for name in dict.fromkeys(line["variant"] for line in remedies)},
        "curve": read_json(path) if path.exists() else None,
    }  # fmt: skip


def _published_values() -> dict:
    published, specification = read_json(SOURCES / "published.json"), read_json(STUDIES / "specification.json")
    titles = ["property", *(one["title"] for one in specification["backbones"].values())]
    return {
        "published": published, "study": published["study"], "described": specification["backbones"],
        "arithmetic_loss": -math.log(published["study"]["arithmetic"]["prob"]),
        "specification": embed_table("specification", "The three backbones, from their configurations.",
                                     markdown_table(titles, specification["lines"], range(4))),
        "errors": specification["errors"],
    }  # fmt: skip


def _row_values(groups: Sequence[ComparedRuns]) -> dict:
    """What needs the rows themselves: the shipped ones."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    facts = loading.describe_rows(rows)["value"].astype(str).str.replace("%", " %").to_dict()
    sample = groups[0] if groups and groups[0].on_sample else None
    values = {
        "facts": facts,
        "lengths": embed_figure(draw_svg(plots.plot_rows(rows)), "lengths", "The shipped rows: lengths, and who wins."),
        "sample": sample,
        "main": None, "reliability": "",
    }  # fmt: skip
    if sample is None or not sample.networks:
        return values
    run = sample.networks[0]
    name = escape_text(run.name)
    labels, probs = run.oof["label"].to_numpy(), run.probs(run.oof.index)
    reliability = plots.plot_reliability(
        scores.reliability_table(labels, probs), run.result["expected_calibration_error"]
    )
    values |= {
        "main": run,
        "reliability": embed_figure(
            draw_svg(reliability), "reliability",
            f"Confidence of {name} against accuracy on validation rows; numbers of rows above the intervals.", "half"),
        "mistakes": mistakes_of(run, rows, 3),
        "slices": None,
    }  # fmt: skip
    if sample.ladder is not None:
        table = slices_of(run, sample.ladder, rows)
        clear = table[(table["difference_low"] > 0) | (table["difference_high"] < 0)]
        caption = f"Log loss of {name} minus that of the ladder, by slice (rows), with 95 % intervals."
        values |= {"slices": embed_figure(draw_svg(plots.plot_slices(table)), "slices", caption),
                   "slice_count": len(table), "slices_clear": len(clear)}  # fmt: skip
    return values


def _fill_readme(readme: Path, groups: Sequence[ComparedRuns], fold_plans: str) -> None:
    """Put the first group's result table, in its short form, between the marks; of shipped rows, `fold_plans` too."""
    text = readme.read_text(encoding="utf-8")
    start, end = README_MARKS
    if text.count(start) != 1 or text.count(end) != 1 or not groups:
        raise UserError(f"{readme}: needs the lines {start!r} and {end!r} once each, and a run to show.")
    before, rest = text.split(start)
    table = f"{groups[0].title}:\n\n{groups[0].readme_table()}" + f"\n\n{fold_plans}" * groups[0].on_sample
    write_text(readme, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")
