"""The report: its numbers are those of the run folders, broken folders are named, pages load nothing."""

import json
import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.evaluation import compare, plots
from prefcls_lib.runtime.files import printable, read_json, sha256, write_json
from report import build, page, read_runs, tables
from report.page import embed_figure, embed_formula, make_page, markdown_table, write_pdf
from report.studies import ceiling, fold_plans, specification

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "report" / "runs"
NAMES = list(LABEL_COLUMNS)
SHIPPED = sha256(sample_path("train"))
ROWS = read_rows(sample_path("train"), labelled=True)


@pytest.fixture
def no_figures(monkeypatch):
    """No figures and formulas: all numbers stand in tables and text."""
    monkeypatch.setattr(page, "embed_formula", lambda tex: "")
    monkeypatch.setattr(page, "draw_svg", lambda figure: b"<svg/>")


@pytest.fixture
def quick(monkeypatch, no_figures):
    """No PDF either."""
    monkeypatch.setattr(page, "write_pdf", lambda document, path: None)


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with one run in it."""
    write_run(tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


def write_run(folder: Path, encoder_share: dict | None = None, **settings: object) -> Path:
    """What a run with 40 validated rows in two folds leaves, without weights; `encoder_share`: what is told of it."""
    random, rows = np.random.default_rng(0), 40
    probs, labels = random.dirichlet((5, 5, 5), rows), random.integers(0, 3, rows)
    folds, groups = np.arange(rows) % 2, np.array([f"p{n // 4}" for n in range(rows)])
    config = RunConfig(backbone="tiny", start_from="structure_logistic", **settings)
    sums = {"train": "1" * 64, "test": "2" * 64}
    share = compare.compare(labels, probs, np.full((rows, 3), 1 / 3), groups).to_dict() | (encoder_share or {})
    prior = {"model": "prior", "log_loss": 1.0986, "low": 1.09, "high": 1.11, "accuracy": 0.34}
    start = {**prior, "model": "structure_logistic", "log_loss": 1.0771}
    result = read_json(RUNS / "minilm" / "result.json") | compare.score_predictions(labels, probs, groups, folds) | {
        "encoder_share": share, "baseline": "structure_logistic", "baselines": [prior, start], "rows": 60,
        "valid_rows": rows, "encoder_only_log_loss": 1.0882, "data_sha256": sums,
    }  # fmt: skip
    write_json(folder / "config.json", {"settings": config.to_dict(), "data_sha256": sums})
    write_json(folder / "result.json", result)
    oof = pd.DataFrame({"id": [str(n) for n in range(rows)], "fold": folds, "label": labels, "group": groups})
    oof[NAMES] = probs
    oof.to_csv(folder / "oof.csv", index=False)
    oof[["id", *NAMES]].head(3).to_csv(folder / "submission.csv", index=False)
    return folder


def write_blend(path: Path, *runs: str, **values: object) -> None:
    """A blend of runs of the folder, which is no better than the last of them."""
    result = read_json(path.parent / runs[-1] / "result.json")
    shown = {name: result[name] for name in read_runs.OF_BLENDS} | {"log_loss_interval": result["log_loss_interval"]}
    blend = shown | {"runs": runs, "best_run": len(runs) - 1, "comparison": result["encoder_share"]}
    write_json(path, blend | values)


def edit_json(path: Path, **changes) -> None:
    write_json(path, read_json(path) | changes)


def read_page(runs: Path, out: Path) -> str:
    assert build.main(["--runs", str(runs), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


def tags_of(page: str) -> list[str]:
    """The names of its elements."""
    return re.findall(r"<([a-z]\w*)", page)


def test_report_of_a_run(runs, tmp_path, monkeypatch):
    """The page fetches nothing, and has the run's numbers, each in its own form; one from Kaggle takes its row."""
    monkeypatch.setattr(page, "write_pdf", lambda document, path: None)
    text, run = read_page(runs, tmp_path / "one"), runs / "tiny"
    loads = re.findall(r'\b(?:src|srcset|data|poster)="([^"]*)"|url\(([^)]*)|@import (.*)', text)
    assert len(loads) > 10
    assert [load for load in map("".join, loads) if not load.startswith("data:image/svg+xml;base64,")] == []
    assert not {"link", "iframe", "object"} & set(tags_of(text))
    assert "{{" not in text and "{%" not in text
    assert f"{read_json(run / 'result.json')['log_loss_interval'][0]:.4f}" in text
    values = {"log_loss": 0.71114, "accuracy": 0.7222, "calibrated_log_loss": 0.73334, "tokens_per_second": 7_444_440.4}
    edit_json(run / "result.json", **values)
    settings = read_json(run / "config.json")["settings"] | {"backbone": "/kaggle/input/roberta-base/transformers/1"}
    edit_json(run / "config.json", settings=settings)
    after = read_page(runs, tmp_path / "two")
    assert [n for n in ("0.7111", "0.722", "0.7333", "7,444,440") if n in text or n not in after] == []
    assert text.count("not yet run on Kaggle") == 3
    assert after.count("not yet run on Kaggle") == 2 and "RoBERTa-base, ours" not in after


def test_pdf_of_a_page_is_the_same_every_time(tmp_path):
    """With a table, a formula and a figure in it, two pages long."""
    svg = (ROOT / "figs" / "siamese.svg").read_bytes()
    table = markdown_table(("a", "b"), [["row", str(n)] for n in range(60)])
    text = f"# Title\n\n## Part\n\n{table}\n{embed_formula('x^2')}{embed_figure(svg, 'network', 'a figure')}"
    page = make_page(text, (ROOT / "report" / "style.css").read_text(encoding="utf-8"))
    files = [tmp_path / "one.pdf", tmp_path / "two.pdf"]
    assert [write_pdf(page, file) for file in files] == [None, None]
    pdf = files[0].read_bytes()
    assert pdf.startswith(b"%PDF") and pdf == files[1].read_bytes()


def _line(page: str, start: str) -> list[str]:
    """The cells of the table's line that begins with this text."""
    cells = page[page.index(f"<td>{start}") :].split("</tr>")[0]
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", cells, flags=re.DOTALL)]


def test_comparison_is_read_from_the_predictions(quick, runs, tmp_path):
    """Of two runs that differ in one setting, and of each with its baseline by result.json, p corrected for both. With
    another training file a run gets a table of its own, and no verdict."""
    share = {"difference": -0.004, "low": -0.007, "high": -0.001, "p": 0.006, "smallest_detectable": 0.004}
    better = write_run(runs / "better", share, head="concat", out="elsewhere")
    table = pd.read_csv(better / "oof.csv", dtype={"id": str})
    old, labels = table[NAMES].to_numpy(), table["label"].to_numpy()
    table[NAMES] = np.where(np.eye(3)[labels] == 1, 0.8, 0.1)
    table.to_csv(better / "oof.csv", index=False)
    order = table["id"].sort_values().index  # in which both are read
    groups = table["group"].to_numpy()[order]
    c = compare.compare(labels[order], table[NAMES].to_numpy()[order], old[order], groups)
    page = read_page(runs, tmp_path / "out")
    assert "head: concat against symmetric<br><small>better, tiny</small>" in page
    shown = [f"{c.difference:.4f}", f"{c.low:.4f} to {c.high:.4f}", "<0.001"]
    line = _line(page, "head: concat against symmetric")
    assert line[1:4] == [text.replace("-", "−") for text in shown] and line[5] == c.verdict == "BEATS"
    line = _line(page, "better<br><small>against structure_logistic")
    assert line[1:] == ["1.0882", "−0.0040", "−0.0070 to −0.0010", "0.012", "0.0040", "BEATS"]
    edit_json(better / "result.json", data_sha256={"train": "0" * 64, "test": "0" * 64})
    apart = read_page(runs, tmp_path / "apart")
    assert page.count("Results: 60 rows") == 1 and apart.count("Results: 60 rows") == 2
    assert "concat against symmetric" not in apart


def test_a_table_counts_its_networks_and_blends(runs):
    """Two networks and a blend against others: three comparisons, each with p .02 by itself, so .06."""
    share = {"difference": -0.02, "low": -0.04, "high": -0.004, "p": 0.02, "smallest_detectable": 0.02}
    for name in ("tiny", "second"):
        write_run(runs / name, share)
    write_blend(runs / "blend.json", "tiny", "second")
    (group,) = tables.make_groups(read_runs.read_runs([runs], ROWS))
    assert list(group.compared) == [runs / "second", runs / "tiny", "blend"]
    names = ["structure_logistic", "structure_logistic", "second"]
    assert [(c.p, c.against(other)) for c, other in group.compared.values()] == [
        (pytest.approx(0.06), f"INCONCLUSIVE against {name}") for name in names
    ]
    assert group.comparisons_table().count("| 0.060 |") == 3
    assert group.readme_table().count("INCONCLUSIVE against") == 2


def spoil_oof(run: Path, rows: int, more: float) -> None:
    """Keep so many rows, and add so much to a probability of the fifth."""
    table = pd.read_csv(run / "oof.csv", dtype={"id": str}).head(rows)
    table.loc[4, NAMES[0]] += more
    table.to_csv(run / "oof.csv", index=False)


def edit_table(path: Path, **values: object) -> None:
    pd.read_csv(path, dtype={"id": str}).assign(**values).to_csv(path, index=False)


# what is said of a run -> how it is broken: a change, or values of result.json
BROKEN_RUNS = {
    "oof.csv has 37 of 40 rows": lambda run: spoil_oof(run, 37, 0),
    "submission.csv": lambda run: (run / "submission.csv").unlink(),
    "row 5": lambda run: spoil_oof(run, 40, 0.5),
    "config.json": lambda run: (run / "config.json").write_text('{"settings": {', encoding="utf-8"),
    "no_such": lambda run: edit_json(run / "config.json", settings={"no_such": 1}),
    "a label is not 0, 1 or 2": lambda run: edit_table(run / "oof.csv", label=7),
    "an id is there more than once": lambda run: edit_table(run / "submission.csv", id="136060"),
    "[None]": {"log_loss": None},
    "KeyError: 'log_loss'": {"baselines": [{"model": "prior"}]},
    "missing": {"encoder_share": {"p": 1.0}},
    "'list'": {"encoder_share": []},
    "['x']": {"flip_rate": "x"},
    "[7]": {"baseline": 7},
    "empty": {"folds": []},
    "no attribute 'get'": {"versions": []},
    "too many values": {"log_loss_interval": [1, 2, 3]},
    "shipped rows": {"data_sha256": {"train": SHIPPED}},
}
BROKEN_BLENDS = ({"runs": []}, {"runs": [1]}, {"best_run": 7}, {"log_loss": "x"}, {"comparison": []})


def test_broken_runs_and_blends_are_named_and_left_out(quick, runs, tmp_path, capsys):
    """The other one stands; page and terminal say what was left out, and why. No folder, no page."""
    for number, values in enumerate(BROKEN_BLENDS):
        write_blend(runs / f"blend{number}.json", "tiny", **values)
    for number, change in enumerate(BROKEN_RUNS.values()):
        run = write_run(runs / f"broken{number:02}")
        edit_json(run / "result.json", **change) if isinstance(change, dict) else change(run)
    page = read_page(runs, tmp_path / "out")
    printed = capsys.readouterr()
    assert build.main(["--runs", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert "report.html (runs: 1, blends: 0)" in printed.out
    *of_runs, said = printed.err.split("left out: ")[1 : len(BROKEN_RUNS) + 2]
    for number, why in enumerate(BROKEN_RUNS):
        assert of_runs[number].startswith(f"{runs / f'broken{number:02}'}: ") and why in of_runs[number]
    assert said.startswith(f"{runs / 'blend0.json'}: ") and printed.err.count("left out") == 22
    left_out = page[page.index("Left out, because broken") :]
    assert all(str(path) in left_out for path in runs.iterdir() if path.name != "tiny")


def test_without_pango_the_html_is_written_and_one_line_says_why(no_figures, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    assert "Results" in read_page(runs, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "report.pdf: WeasyPrint does not start" in lines[0] and "Pango" in lines[0]
    assert not (tmp_path / "out" / "report.pdf").exists()


def test_readme_gets_the_table_between_its_marks(quick, runs, tmp_path):
    readme = tmp_path / "README.md"
    start, end = build.README_MARKS
    readme.write_text(f"before\n{start}\nstale\n{end}\nafter\n", encoding="utf-8")
    arguments = ["--runs", str(runs), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert build.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{start}\n") and text.endswith(f"{end}\nafter\n")
    assert "stale" not in text and "uniform guess" in text
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    names = [line[0].split(":")[0].strip() for line in table[2:]]
    assert names == ["uniform guess, ln 3", "prior", "structure_logistic", "tiny"] and len(table[0]) == 9
    readme.write_text("no marks\n", encoding="utf-8")
    assert build.main(arguments) == 2 and readme.read_text(encoding="utf-8") == "no marks\n"


FOREIGN = "<script>a|b</script> *c* `d` __e__ $f_{1$ {{ 7 * 7 }} {% if %} [figure lengths] <!-- \x1b[31m\ud800 \\"


def test_foreign_text_stays_text(quick, runs, tmp_path):
    """Names of folders, models and machines, and settings, break no table and write nothing into the page."""
    run, pages = write_run(runs / f"x{FOREIGN.replace('/', '')[:-3]}"), []
    for text in ("plain", FOREIGN):
        result, config = read_json(run / "result.json"), read_json(run / "config.json")
        result["baselines"][1]["model"] = result["baseline"] = result["versions"]["machine"] = text
        config["settings"]["backbone"] = printable(text)  # other settings are refused
        for name, content in (("result.json", result), ("config.json", config)):
            (run / name).write_text(json.dumps(content), encoding="utf-8")
        pages.append(read_page(runs, tmp_path / "out"))
    assert tags_of(pages[0]) == tags_of(pages[1])
    assert "{{ 7 * 7 }}" in pages[1] and r"\x1b[31m\ud800" in pages[1]


def test_names_in_figures_are_no_formulas():
    """One that is would stop the drawing."""
    lines = {name: [1.0] for name in ("log_loss", "low", "high", "difference", "difference_low", "difference_high")}
    table = pd.DataFrame(lines | {"name": "a", "value": FOREIGN[:-9], "count": 1}, index=["$x_{1$"])
    assert all(page.draw_svg(plot(table)) for plot in (plots.plot_results, plots.plot_slices))


def test_every_paper_that_the_code_names_is_in_the_references():
    """First author and year of "Guo et al. 2017", "Davison and Hinkley 1997", "Holm 1979"; and every arXiv number."""
    text = (ROOT / "report" / "report.md").read_text(encoding="utf-8").split("## References")[1].replace("ö", "oe")
    references = text.split("\n- ")
    paper = re.compile(r"([A-Z][a-z]+)(?: et al\.|, [A-Z]\w+)*(?: and (?:van )?[A-Z]\w+)? ((?:19|20)\d\d)\b")
    paths = [path for part in ("prefcls_lib", "figs", "report") for path in (ROOT / part).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    named = set(paper.findall(source))
    assert len(named) > 10
    assert [words for words in named if not any(words[0] in one and words[1] in one for one in references)] == []
    assert [number for number in re.findall(r"arxiv.org/abs/([\d.]+\d)", source) if number not in text] == []


def test_errors_of_the_published_table_are_found_by_comparing(monkeypatch):
    """Parameters by hand: attention, feed-forward, two layer norms a layer. The committed file is of this code."""
    published = read_json(ROOT / "report" / "published.json")["study"]["specification"]
    described, h, f = specification.describe_backbones(published), 768, 3072
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
    assert described["roberta-base"]["backbone"] == 12 * layer
    assert described["roberta-base"]["embedding"] == (50265 + 514 + 1 + 2) * h
    errors = specification.find_errors(described, published)
    assert [e for e in errors if e.startswith("ELECTRA-large: 335 M parameters in the layers; there are 302.3 M")]
    sizes = ("embedding", "backbone", "total")
    right = {name: {**one, "positions": one["absolute positions"], **{key: one[key] / 1e6 for key in sizes}}
             for name, one in described.items()}  # fmt: skip
    assert specification.find_errors(described, right) == []
    right["roberta-base"]["layers"] = 13
    assert specification.find_errors(described, right) == ["RoBERTa-base: layers 13, the configuration says 12."]
    monkeypatch.setattr(specification, "describe_backbones", lambda *_: described)
    assert read_json(specification.FOLDER / "specification.json") == specification.make_specification()


def test_fold_plans_by_hand():
    """Of four plans with 1.00, 1.02, 1.04 and 1.06, three are below 1.05; mean 1.03, variance .002 / 3."""
    found = fold_plans.summarise(1.05, [1.0, 1.02, 1.04, 1.06])
    assert (found["plans"], found["share_lower"], found["mean"]) == (4, 0.75, pytest.approx(1.03))
    assert found["standard_deviation"] == pytest.approx((0.002 / 3) ** 0.5)
    numbers = re.findall(r"\d\.\d{4}|\d+ %|\d+ other", found["sentence"])
    assert numbers == ["4 other", "1.0300", "0.0258", "1.0500", "75 %"]
    study = read_json(ROOT / "report" / "studies" / "fold_plans.json")  # the committed summary is that of its numbers
    assert fold_plans.summarise(study["shipped_log_loss"], study["log_losses"]) == study and study["plans"] == 60


def test_a_vote_is_predicted_from_the_others_of_other_folds():
    """Fold 0 has AAB, fold 1 AAA and BBB, by hand: nothing known, one other vote known, both known."""
    votes, folds = np.array([[0, 0, 1], [0, 0, 0], [1, 1, 1]]), np.array([0, 1, 1])
    shares = np.array([4, 4, 1]) / 9  # three votes each for A and B in fold 1, and one for each class
    none, one, both = (ceiling.predict_votes(votes, folds, known)[0] for known in range(3))
    assert none == pytest.approx(-(2 * np.log(shares[0]) + np.log(shares[1])) / 3)
    # after A came A six times, after B came B six times: (6 + 1) / (6 + 3), and 1 / 9 for another vote
    assert one == pytest.approx(-(2 * np.log(7 / 9) + 4 * np.log(1 / 9)) / 6)
    # the last B stands beside two A, 1 / 9; an A stands beside A and B, which fold 1 does not have: 1 / 3
    assert both == pytest.approx(-(np.log(1 / 9) + 2 * np.log(1 / 3)) / 3)


def test_the_ceiling_of_known_mixtures():
    """Where all three agree nothing is left; coins thrown three times leave ln 2 at most, and other mixtures less."""
    assert ceiling.bound_entropy(3 * np.eye(3, dtype=int)) == pytest.approx((0, 0), abs=1e-6)
    coins = [[3, 0, 0], *3 * [[2, 1, 0]], *3 * [[1, 2, 0]], [0, 3, 0]]
    least, most = ceiling.bound_entropy(np.array(coins))
    assert 0.5 < least <= most == pytest.approx(np.log(2), abs=1e-6)
