"""The learning curve for the report: a picture, a table and the numbers of the text, from learning_curve.json.

python -m report.studies.curve          writes learning_curve.svg and curve.json beside it; `make report` calls it
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.evaluation import compare, plots
from prefcls_lib.runtime.files import read_json, write_json
from report.page import draw_svg, escape_text, markdown_table, signed

FOLDER = Path(__file__).parent


def summarise(curves: Sequence[dict], against: str = "comparison") -> list[dict]:
    """For each curve and number of rows, means and ranges over the seeds; verdicts corrected for all points.

    `against`: the comparison of a point that counts, "comparison" (the network with its baseline) or
    "comparison_default" (with the network without the last changed setting); points without it are left out.
    """
    points = [(curve, point) for curve in curves for point in curve["points"] if point[against]]
    corrected = compare.holm_correction([compare.Comparison.from_dict(point[against]) for _, point in points])
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


def make_table(lines: Sequence[dict]) -> str:
    """`summarise` as a Markdown table."""
    names = ("prior", "structure_logistic", "baseline", "network")
    cells = []
    for line in lines:
        verdicts = [c.verdict for c in line["found"]]
        who = f"{line['title']}, {escape_text(line['backbone'])}".replace(" ", "\u00a0").replace("-", "\u2011")
        cells.append([who, f"{line['rows']:,}", str(len(verdicts)),
                      *(f"{line['log_loss'][name]:.4f}" for name in names), signed(f"{line['difference']:+.4f}"),
                      signed(f"{line['low']:+.4f} to {line['high']:+.4f}"),
                      f"{verdicts.count('BEATS')} / {verdicts.count('LOSES')}"])  # fmt: skip
    header = ("votes, network", "rows", "seeds", "class shares", "structure logistic", "its baseline", "network",
              "difference", "range", "BEATS / LOSES")  # fmt: skip
    return markdown_table(header, cells)


def make_recipe_table(lines: Sequence[dict]) -> str:
    """`summarise(recipes, "comparison_default")` as a Markdown table, the best settings first.

    It has the number of rows with which most settings were compared.
    """
    cells, rows = [], pd.Series([line["rows"] for line in lines]).mode()[0]
    for line in sorted((line for line in lines if line["rows"] == rows), key=lambda line: line["difference"]):
        verdicts = [c.verdict for c in line["found"]]
        network, _, changed = line["backbone"].rpartition("+")
        name, *others = escape_text(network).split("+")
        beside = f"with {', '.join(others)}".replace(" ", "\u00a0")
        note = f"<br><small>{beside}</small>" if others else ""
        cells.append([escape_text(changed) + note, name, f"{line['rows']:,}",
                      str(len(verdicts)), f"{line['log_loss']['network']:.4f}", signed(f"{line['difference']:+.4f}"),
                      signed(f"{line['low']:+.4f} to {line['high']:+.4f}"),
                      f"{verdicts.count('BEATS')} / {verdicts.count('LOSES')}"])  # fmt: skip
    header = ("changed", "network", "rows", "seeds", "log loss", "difference", "range", "BEATS / LOSES")
    return markdown_table(header, cells)


def plot_learning_curve(curves: list[dict], published: dict) -> Figure:
    """Against the number of training rows: log loss, the network minus its baseline, and what others published.

    Args:
        curves: source, title, backbone, and points (rows, seed, log_loss by name, comparison). Each source has a row of
            panels, each of its curves a mark; lines are means over seeds.
        published: title, and points (rows, log_loss, sd).
    """
    sources = list(dict.fromkeys(curve["source"] for curve in curves))
    figure = Figure(figsize=(7.5, 2.9 * len(sources)), layout="constrained")
    panels = figure.subplots(len(sources), 3, squeeze=False)
    for (left, middle, _), source in zip(panels, sources, strict=True):
        here = [curve for curve in curves if curve["source"] == source]
        for place, (curve, color, mark) in enumerate(
            zip(here, (plots.BLUE, plots.GREEN, plots.PINK, plots.GREY), "s^vD", strict=False)
        ):
            table = pd.DataFrame([{**one["log_loss"], **one["comparison"], "rows": one["rows"]}
                                  for one in curve["points"]])  # fmt: skip
            means = table.select_dtypes("number").groupby("rows").mean()
            if place == 0:
                band = means[[name for name in ("structure_logistic", "structure_tfidf", "baseline") if name in means]]
                left.plot(means["prior"], color="black", lw=1, ls=":", label="class shares")
                left.fill_between(means.index, band.min(axis=1), band.max(axis=1), color=plots.ORANGE, alpha=0.4, lw=0,
                                  label="baselines")  # fmt: skip
                left.plot(band.min(axis=1), color=plots.ORANGE, lw=1, ls="--")
            left.plot(means["network"], mark, ls="-", color=color, ms=4, label=curve["backbone"])
            at = table["rows"] * (1 + 0.04 * (table.groupby("rows").cumcount() + 3.5 * place))  # side by side
            errors = np.maximum(0, [table["difference"] - table["low"], table["high"] - table["difference"]])
            middle.errorbar(at, table["difference"], errors, fmt=mark, color=color, ms=4, lw=1)
        middle.axhline(0, color="black", lw=1, ls=":")
        left.set(title=here[0]["title"], ylabel="log loss, unsmoothed")
        middle.set(title="network minus its baseline")
        left.legend(frameon=False, fontsize=7)
        _scale_rows((left, middle), {point["rows"] for curve in here for point in curve["points"]})
    table = pd.DataFrame(published["points"])
    panels[0, 2].errorbar(
        table["rows"], table["log_loss"], table["sd"], fmt="D--", color=plots.PINK, mfc="white", capsize=3
    )
    panels[0, 2].set(title=published["title"])
    _scale_rows(panels[0, 2:], set(table["rows"]))
    for axes in panels[1:, 2]:
        axes.set_axis_off()
    return plots.finish(figure)


def _scale_rows(panels: Sequence, rows: set[int]) -> None:
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(sorted(rows), [f"{tick:,}" for tick in sorted(rows)], fontsize=7.5)
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("training rows", fontsize=8.5)


def main(folder: Path = FOLDER) -> None:
    """Read, draw, write."""
    published = read_json(FOLDER.parent / "published.json")["learning_curve"]
    content = read_json(folder / "learning_curve.json")
    for curve in content["curves"] + content["recipes"]:
        curve["title"] = published["sources"].get(curve["source"], curve["source"])
    curves, recipes = content["curves"], summarise(content["recipes"], "comparison_default")
    lines = summarise(curves)
    (folder / "learning_curve.svg").write_bytes(draw_svg(plot_learning_curve(curves, published)))
    names = ("source", "title", "backbone", "rows", "eval_rows", "difference", "low", "high")
    short = [{name: line[name] for name in names} for line in lines]
    recipe_table = make_recipe_table(recipes) if recipes else None
    write_json(folder / "curve.json", {"lines": short, "table": make_table(lines), "recipes": recipe_table})


if __name__ == "__main__":
    main()
