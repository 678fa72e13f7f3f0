"""The report: run folders and published numbers in, report.html and report.pdf out; nothing is trained or predicted."""

import math
from collections.abc import Sequence
from pathlib import Path

from prefcls_lib.data import loading
from prefcls_lib.ensemble.finished import Found, format_verdicts, read_runs
from prefcls_lib.evaluation import metrics, plots
from prefcls_lib.report.page import (
    draw_svg,
    embed_figure,
    escape_text,
    fill_template,
    make_page,
    markdown_table,
    write_pdf,
)
from prefcls_lib.report.tables import (
    ComparedRuns,
    backbone_lines,
    bias_table,
    calibration_table,
    make_groups,
    mistakes_of,
    prediction_lines,
    slices_of,
    speed_table,
)
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
    values = {"found": found, "groups": groups, **_published_values(found), **_row_values(groups)}
    values |= {
        "known_floors": {path.stem: read_json(path) for path in sorted(STUDIES.glob("known_floor*.json"))},
        **{name: read_json(STUDIES / f"{name}.json") for name in ("orders", "sorting", "encoding")},
        "fold_plans": read_json(STUDIES / "fold_plans.json")["sentence"],
        "log": _read_section(SOURCES / "log.md"),
        "benchmark": _read_section(STUDIES / "benchmark" / "benchmark.md"),
        "t4_plan": _read_section(STUDIES / "t4_plan.md"),
        "gpu_check": _read_section(STUDIES / "gpu_check.md"),
        "compared": lambda values: format_verdicts([(metrics.Comparison.from_dict(values), "one order")])[0],
        "escape": escape_text, "table": markdown_table, "bias_table": bias_table,
        "calibration_table": calibration_table, "speed_table": speed_table, "uniform": plots.UNIFORM,
        "picture": lambda path, *caption: embed_figure((SOURCES.parent / path).read_bytes(), *caption),
    }  # fmt: skip
    page = make_page(fill_template(SOURCES / "report.md", values), (SOURCES / "style.css").read_text(encoding="utf-8"))
    write_text(out / "report.html", page)
    problem = write_pdf(page, out / "report.pdf")
    if groups:
        write_text(out / "results.svg", draw_svg(groups[0].draw_results()).decode())
    if readme is not None:
        _fill_readme(readme, groups, values["fold_plans"])
    return found, [problem] if problem else []


def _read_section(path: Path) -> str:
    """A Markdown file without its title, headings one level down."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return "\n".join(f"#{line}" if line.startswith("##") else line for line in lines)


def _published_values(found: Found) -> dict:
    published = read_json(SOURCES / "published.json")
    study = published["study"]
    specification = read_json(STUDIES / "specification.json")
    described = specification["backbones"]
    return {
        "published": published, "study": study, "described": described,
        "arithmetic_loss": -math.log(study["arithmetic"]["prob"]),
        "others": [[escape_text(line["what"]), f"{line['log_loss']:.3f}"] for line in published["others"]["results"]],
        "specification": markdown_table(["", *(one["title"] for one in described.values())],
                                        specification["lines"], range(4)),
        "errors": specification["errors"],
        "backbones": markdown_table(("", "smoothed", "log loss", "95 % interval", "accuracy", "best epoch"),
                                    backbone_lines(found, described, study)),
        "predictions": markdown_table(("test row", "model", "A wins", "B wins", "tie"),
                                      prediction_lines(found, described, study), (0, 1)),
    }  # fmt: skip


def _row_values(groups: Sequence[ComparedRuns]) -> dict:
    """What needs the rows themselves: the shipped ones."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    facts = [[name, escape_text(str(value))] for name, value in loading.describe_rows(rows)["value"].items()]
    values = {
        "facts": markdown_table(("shipped rows", ""), facts),
        "lengths": embed_figure(draw_svg(plots.plot_rows(rows)), "The shipped rows: how long, and who wins."),
        "spotlight": None,
    }
    group = groups[0] if groups and groups[0].on_sample and groups[0].networks else None
    if group is None:
        return values
    run = group.networks[0]
    best = min(baseline["log_loss"] for baseline in group.baselines)
    labels, probs = run.oof["label"].to_numpy(), run.probs(run.oof.index)
    reliability = plots.plot_reliability(
        metrics.reliability_table(labels, probs), run.result["expected_calibration_error"]
    )
    values |= {
        "spotlight": run,
        "history": embed_figure(draw_svg(plots.plot_history(run.history, best)), "One line a fold.", "half"),
        "reliability": embed_figure(
            draw_svg(reliability),
            "Confidence against accuracy on validation rows; points as large as their rows are many.", "half"),
        "mistakes": mistakes_of(run, rows, 3),
        "slices": None,
    }  # fmt: skip
    if group.ladder is not None:
        table = slices_of(run, group.ladder, rows)
        clear = table[(table["difference_low"] > 0) | (table["difference_high"] < 0)]
        values |= {
            "slices": embed_figure(draw_svg(plots.plot_slices(table)), "Slices of the validation rows (rows in "
                                   "brackets), with 95 % intervals over prompts."),
            "slice_count": len(table), "slices_clear": len(clear),
        }  # fmt: skip
    return values


def _fill_readme(readme: Path, groups: Sequence[ComparedRuns], fold_plans: str) -> None:
    """Put the first group's result table, in its short form, between the marks; of shipped rows, `fold_plans` too."""
    text = readme.read_text(encoding="utf-8")
    start, end = README_MARKS
    if text.count(start) != 1 or text.count(end) != 1 or not groups:
        raise UserError(f"{readme}: needs the lines {start!r} and {end!r} once each, and a run to show.")
    before, rest = text.split(start)
    table = f"{groups[0].title}:\n\n{groups[0].results_table(short=True)}" + f"\n\n{fold_plans}" * groups[0].on_sample
    write_text(readme, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")
