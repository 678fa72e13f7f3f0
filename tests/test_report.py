"""The report: its numbers are those of the run folders, broken folders are named, pages load nothing."""

import json
import re
import shutil
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from prefcls_lib import cli
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.ensemble import finished
from prefcls_lib.evaluation import compare
from prefcls_lib.report import build, groups, page, tables
from prefcls_lib.report.page import embed_figure, embed_formula, escape_text, make_page, markdown_table, write_pdf
from prefcls_lib.runtime.files import UserError, read_json
from report.studies import fold_plans, specification, votes

ROOT = Path(__file__).parents[1]
NAMES = list(LABEL_COLUMNS)


@pytest.fixture(scope="module")
def described():
    names = json.loads((ROOT / "report" / "published.json").read_text(encoding="utf-8"))["study"]["specification"]
    return specification.describe_backbones(ROOT / "report" / "backbones", names)


@pytest.fixture
def no_pdf(monkeypatch):
    """No PDF."""
    monkeypatch.setattr(build, "write_pdf", lambda document, path: None)


@pytest.fixture
def quick(monkeypatch, no_pdf):
    """No figures and formulas either: all numbers stand in tables and text."""
    monkeypatch.setattr(page, "embed_formula", lambda tex: "")
    monkeypatch.setattr(build, "draw_svg", lambda figure: b"<svg/>")
    monkeypatch.setattr(groups, "draw_svg", lambda figure: b"<svg/>")


@pytest.fixture
def runs(tmp_path, finished_run) -> Path:
    """A folder with one run in it, without weights, as it is copied in."""
    folder = tmp_path / "runs"
    copy_run(finished_run, folder / "tiny")
    return folder


def copy_run(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for name in ("config.json", "result.json", "history.csv", "oof.csv", "valid.csv", "submission.csv"):
        shutil.copyfile(source / name, target / name)
    return target


def edit_json(path: Path, **changes) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return content


def read_page(runs: Path, out: Path) -> str:
    assert cli.main(["report", "--runs", str(runs), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


class Loads(HTMLParser):
    """Everything that a browser would fetch for a page, and the headings."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)
        self.found += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.found.append(value)


def test_report_of_a_run(no_pdf, runs, tmp_path):
    """The page holds the run's numbers, is the same every time, and fetches nothing."""
    page = read_page(runs, tmp_path / "one")
    assert read_page(runs, tmp_path / "two") == page
    loads = Loads(page)
    assert len(loads.found) > 10
    assert [load[:60] for load in loads.found if not load.startswith("data:image/svg+xml;base64,")] == []
    assert not {"link", "iframe", "object"} & set(loads.tags)
    result = json.loads((runs / "tiny" / "result.json").read_text(encoding="utf-8"))
    for number in (result["log_loss"], result["log_loss_interval"][0], result["calibrated_log_loss"]):
        assert f"{number:.4f}" in page
    assert page.count("not yet run on Kaggle") == 3
    assert "{{" not in page and "{%" not in page


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


@pytest.mark.parametrize("name", ["log_loss", "accuracy", "calibrated_log_loss", "tokens_per_second"])
def test_a_number_changed_in_the_folder_changes_in_the_report(quick, runs, tmp_path, name):
    shown = {"log_loss": "0.7654", "accuracy": "0.765", "calibrated_log_loss": "0.7654", "tokens_per_second": "1"}[name]
    value = 0.7654321
    if name == "tokens_per_second":
        value, shown = 76_543_210.4, "76,543,210"
    assert shown not in read_page(runs, tmp_path / "before")
    edit_json(runs / "tiny" / "result.json", **{name: value})
    assert shown in read_page(runs, tmp_path / "after")


def test_comparison_is_read_from_the_predictions(quick, runs, finished_run, tmp_path):
    """Two runs that differ in one setting: the table says which, and what `compare.compare` says of their rows."""
    better = copy_run(finished_run, runs / "better")
    settings = json.loads((better / "config.json").read_text(encoding="utf-8"))["settings"]
    edit_json(better / "config.json", settings={**settings, "head": "concat", "out": "elsewhere"})
    table = pd.read_csv(better / "oof.csv", dtype={"id": str})
    old = table[NAMES].to_numpy()
    table[NAMES] = 0.1
    for row, label in enumerate(table["label"]):
        table.loc[row, NAMES[label]] = 0.8
    table.to_csv(better / "oof.csv", index=False)
    groups = pd.read_csv(better / "valid.csv", dtype=str).set_index("id")["group"][table["id"]]
    ids = table["id"].sort_values().index  # the order in which both are read
    c = compare.compare(table["label"].to_numpy()[ids], table[NAMES].to_numpy()[ids], old[ids], groups.to_numpy()[ids])
    page = read_page(runs, tmp_path / "out")
    assert "head: concat against symmetric<br><small>better, tiny</small>" in page
    assert c.verdict == "BEATS"
    shown = [f"{c.difference:.4f}", f"{c.low:.4f} to {c.high:.4f}", "<0.001"]
    assert _line(page, "head: concat against symmetric")[1:4] == [text.replace("-", "−") for text in shown]
    assert _line(page, "head: concat against symmetric")[5] == "BEATS"


def _line(page: str, start: str) -> list[str]:
    """The cells of the table's line that begins with this text."""
    cells = page[page.index(f"<td>{start}") :].split("</tr>")[0]
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", cells, flags=re.DOTALL)]


def test_what_the_encoder_adds_has_a_table(quick, runs, tmp_path):
    """The network minus its baseline, with the interval; a network that starts from none has no line there."""
    share = {"difference": -0.004, "low": -0.007, "high": -0.001, "p": 0.012, "verdict": "BEATS"}
    share |= {"smallest_detectable": 0.004, "rows": 40, "groups": 40}
    values = {"encoder_share": share, "baseline_log_loss": 1.0771, "encoder_only_log_loss": 1.0882}
    edit_json(runs / "tiny" / "result.json", **values)
    settings = json.loads((runs / "tiny" / "config.json").read_text(encoding="utf-8"))["settings"]
    edit_json(runs / "tiny" / "config.json", settings={**settings, "start_from": "structure_tfidf"})
    shown = ["1.0882", "−0.0040", "−0.0070 to −0.0010", "0.012", "0.0040", "BEATS"]
    page = read_page(runs, tmp_path / "with")
    assert _line(page, "tiny</td>\n  <td>structure")[1:3] == ["structure_tfidf", "1.0771"]
    assert _line(page, "tiny</td>\n  <td>structure")[4:] == shown
    edit_json(runs / "tiny" / "config.json", settings={**settings, "start_from": "none"})
    assert "1.0882" not in read_page(runs, tmp_path / "without")


def test_runs_on_other_rows_are_not_compared(quick, runs, finished_run, tmp_path):
    """Another training file: a table of its own, and no verdict between the two."""
    other = copy_run(finished_run, runs / "other")
    settings = json.loads((other / "config.json").read_text(encoding="utf-8"))["settings"]
    edit_json(other / "config.json", settings={**settings, "head": "concat"})
    same = read_page(runs, tmp_path / "same")
    edit_json(other / "result.json", data_sha256={"train": "0" * 64, "test": "0" * 64})
    apart = read_page(runs, tmp_path / "apart")
    assert same.count("Results: 60 rows") == 1 and "concat against symmetric" in same
    assert apart.count("Results: 60 rows") == 2 and "concat against symmetric" not in apart
    one, two = (finished.read_run(runs / name) for name in ("other", "tiny"))
    assert finished.compare_runs(one, two) is None


def test_verdicts_of_a_table_are_corrected_for_all_of_them():
    """p .03 of a single comparison BEATS; beside another it is .06, and its own interval is shown."""
    one = compare.Comparison(-0.03, -0.058, -0.002, 0.04, 500, 400, 0.03)
    other = compare.Comparison(0.01, -0.02, 0.04, 0.0425, 500, 400, 0.4)
    numbers = "0.0300 lower (95 % CI −0.0580 to −0.0020, p=0.030), MDE 0.0400"
    assert finished.format_verdicts([(one, "x-y")]) == [f"BEATS x-y: {numbers}"]
    assert finished.format_verdicts([(one, "x-y"), (other, "z")]) == [
        f"INCONCLUSIVE against x-y: {numbers.replace('030)', '060)')}",
        "INCONCLUSIVE against z: 0.0100 higher (95 % CI −0.0200 to +0.0400, p=0.400), MDE 0.0425",
    ]
    assert finished.format_verdicts([]) == []


def test_difference_in_a_sentence():
    """The direction is a word; the interval has signs, so that one that holds zero is seen at once."""
    assert tables.format_difference({"difference": -0.0164, "low": -0.0255, "high": -0.0072}) == (
        "0.0164 lower [−0.0255, −0.0072]"
    )
    assert tables.format_difference({"difference": 0.0001, "low": -0.0006, "high": 0.0008}) == (
        "0.0001 higher [−0.0006, +0.0008]"
    )


def test_a_table_counts_its_networks_and_blends(runs, finished_run):
    """Two networks and a blend against others: three comparisons, each with p .02 by itself, so .06."""
    second = copy_run(finished_run, runs / "second")
    content = {"difference": -0.02, "low": -0.04, "high": -0.004, "p": 0.02, "smallest_detectable": 0.02}
    content |= {"rows": 40, "groups": 40, "verdict": "BEATS"}
    for run in (runs / "tiny", second):
        edit_json(run / "result.json", comparison=content)
    blend = {"runs": ["tiny", "second"], "rows": 40, "log_loss": 1.0, "accuracy": 0.5, "log_loss_interval": [0.9, 1.1],
             "expected_calibration_error": 0.1, "best_run": 1, "comparison": content}  # fmt: skip
    (runs / "blend.json").write_text(json.dumps(blend), encoding="utf-8")
    (group,) = groups.make_groups(finished.read_runs([runs]))
    assert list(group.compared) == [second, runs / "tiny", "blend"]
    verdicts = finished.format_verdicts(list(group.compared.values()))
    assert [text.split(":")[0] for text in verdicts] == [
        "INCONCLUSIVE against the best baselines",
        "INCONCLUSIVE against the best baselines",
        "INCONCLUSIVE against second",
    ]
    assert all("p=0.060" in text for text in verdicts)
    assert group.comparisons_table().count("| 0.060 |") == 3


def test_an_earlier_version_s_result_gets_the_scores_that_it_lacks(runs):
    """Deviation over folds and expected ECE come from the predictions; what result.json says stays."""
    before = finished.read_run(runs / "tiny").result
    names = ("log_loss_fold_sd", "expected_calibration_error_if_calibrated")
    old = {name: value for name, value in before.items() if name not in names} | {"accuracy": 0.123}
    (runs / "tiny" / "result.json").write_text(json.dumps(old), encoding="utf-8")
    after = finished.read_run(runs / "tiny").result
    assert [after[name] for name in names] == pytest.approx([before[name] for name in names])
    assert after["accuracy"] == 0.123


def cut_oof(run: Path) -> str:
    lines = (run / "oof.csv").read_text(encoding="utf-8").splitlines()
    (run / "oof.csv").write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
    return "oof.csv"


def cut_oof_and_valid(run: Path) -> str:
    cut_oof(run)
    lines = (run / "valid.csv").read_text(encoding="utf-8").splitlines()
    (run / "valid.csv").write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
    return "37 rows, result.json says 40"


def drop_number(run: Path) -> str:
    edit_json(run / "result.json", log_loss=None)
    return "log_loss is None"


def spoil_json(run: Path) -> str:
    (run / "config.json").write_text('{"settings": {', encoding="utf-8")
    return "config.json"


def drop_history(run: Path) -> str:
    (run / "history.csv").unlink()
    return "history.csv"


def spoil_probs(run: Path) -> str:
    table = pd.read_csv(run / "oof.csv", dtype={"id": str})
    table.loc[4, NAMES[0]] += 0.5
    table.to_csv(run / "oof.csv", index=False)
    return "row 5"


@pytest.mark.parametrize("break_run", [cut_oof, cut_oof_and_valid, drop_number, spoil_json, drop_history, spoil_probs])
def test_a_broken_run_is_named_and_left_out(quick, runs, finished_run, tmp_path, capsys, break_run):
    """The others stand; page and terminal say which folder was left out, and why."""
    why = break_run(copy_run(finished_run, runs / "broken"))
    page = read_page(runs, tmp_path / "out")
    printed = capsys.readouterr()
    assert "report of 1 runs" in printed.out
    assert "left out: " in printed.err and str(runs / "broken") in printed.err and why in printed.err
    left_out = page[page.index("Left out, because broken") :]
    assert escape_text(str(runs / "broken")).replace("&#95;", "_") in re.sub("&#95;", "_", left_out)


def test_without_pango_the_html_is_written_and_one_line_says_why(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    assert "Results" in read_page(runs, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "report.pdf is not written" in lines[0] and "Pango" in lines[0]
    assert not (tmp_path / "out" / "report.pdf").exists()


def test_a_run_of_a_backbone_takes_its_place(quick, runs, finished_run, tmp_path):
    """A run from Kaggle is known by its folder's name, and the row no longer says that there is none."""
    run = copy_run(finished_run, runs / "from-kaggle")
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    edit_json(run / "config.json", settings={**settings, "backbone": "/kaggle/input/roberta-base/transformers/1"})
    page = read_page(runs, tmp_path / "out")
    assert page.count("not yet run on Kaggle") == 2 and "RoBERTa-base, ours" not in page


def test_readme_gets_the_table_between_its_marks(quick, runs, tmp_path):
    readme = tmp_path / "README.md"
    start, end = build.README_MARKS
    readme.write_text(f"before\n{start}\nstale\n{end}\nafter\n", encoding="utf-8")
    arguments = ["report", "--runs", str(runs), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert cli.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{start}\n") and text.endswith(f"{end}\nafter\n")
    assert "stale" not in text and "uniform guess" in text
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0]][-2:] == ["with the encoder, log loss is", "verdict"]
    assert len(table) - 2 <= 6 and all(len(line) == 6 for line in table), "the short form"
    assert cli.main(arguments) == 0
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text("no marks\n", encoding="utf-8")
    assert cli.main(arguments) == 2 and readme.read_text(encoding="utf-8") == "no marks\n"


def test_a_place_that_is_not_there(tmp_path, capsys):
    assert cli.main(["report", "--runs", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_foreign_names_are_text():
    """A folder's name breaks neither the table nor the page."""
    name = "<script>a|b</script> *c* `d`"
    page = make_page("# t\n\n" + markdown_table(("run", "n"), [[escape_text(name), "1"]]), "")
    tags = Loads(page).tags
    assert tags.count("script") == 1 and "em" not in tags and "code" not in tags
    assert tags.count("td") == 2


@pytest.mark.parametrize("name", ["roberta-base", "electra-large-discriminator"])
def test_parameters_are_those_of_the_architecture(described, name):
    """Counted by hand from the widths: attention, feed-forward, two layer norms a layer; no pooler."""
    config = json.loads((ROOT / "report" / "backbones" / f"{name}.json").read_text(encoding="utf-8"))["config"]
    h, f = config["hidden_size"], config["intermediate_size"]
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
    table = sum(config[key] for key in ("vocab_size", "max_position_embeddings", "type_vocab_size"))
    assert described[name]["backbone"] == config["num_hidden_layers"] * layer
    assert described[name]["embedding"] == (table + 2) * h


def test_errors_of_the_published_table_are_found_by_comparing(described):
    published = json.loads((ROOT / "report" / "published.json").read_text(encoding="utf-8"))["study"]["specification"]
    errors = specification.find_errors(described, published)
    assert [e for e in errors if e.startswith("ELECTRA-large: 335 M parameters in the layers; there are 302.3 M")]
    right = {
        name: {**one, "positions": one["absolute positions"],
               **{key: one[key] / 1e6 for key in ("embedding", "backbone", "total")}}
        for name, one in described.items()
    }  # fmt: skip
    assert specification.find_errors(described, right) == []
    right["roberta-base"]["layers"] = 13
    assert specification.find_errors(described, right) == ["RoBERTa-base: layers 13, the configuration says 12."]


def test_script_of_a_text_by_hand():
    """A tenth of the letters decides; marks and digits beyond ASCII are no letters; kana and kanji are one."""
    texts = {"plain": "ASCII", "a – b": "ASCII and symbols", "abcdefghijklé": "ASCII, few others",
             "né": "Latin with accents", "да ok": "Cyrillic", "これは漢字": "Chinese, Japanese, Korean"}  # fmt: skip
    assert {text: votes._find_script(text) for text in texts} == texts


def test_the_committed_specification_is_of_the_committed_configurations(described, monkeypatch):
    """What the report shows is what the study would write now."""
    monkeypatch.setattr(specification, "describe_backbones", lambda *_: described)
    assert read_json(specification.FOLDER / "specification.json") == specification.make_specification()


def test_fold_plans_by_hand():
    """Of four plans with 1.00, 1.02, 1.04 and 1.06, three are below 1.05; mean 1.03, variance .002 / 3."""
    found = fold_plans.summarise(1.05, [1.0, 1.02, 1.04, 1.06])
    assert (found["plans"], found["share_lower"], found["mean"]) == (4, 0.75, pytest.approx(1.03))
    assert found["standard_deviation"] == pytest.approx((0.002 / 3) ** 0.5)
    for part in (
        "over 4 other plans",
        "mean log loss of 1.0300",
        "deviation of 0.0258",
        "1.0500, more than 75 % of them",
    ):
        assert part in found["sentence"]


def test_the_committed_fold_plans_are_of_the_committed_ladder():
    """The shipped plan's log loss is that in the ladder's run, and the summary is that of the sixty log losses."""
    study = read_json(ROOT / "report" / "studies" / "fold_plans.json")
    ladder = read_json(ROOT / "report" / "runs" / "ladder" / "result.json")["ladder"]
    (line,) = [line for line in ladder if line["rung"] == study["baseline"]]
    assert study["shipped_log_loss"] == pytest.approx(line["log_loss"], abs=5e-5)
    assert fold_plans.summarise(study["shipped_log_loss"], study["log_losses"]) == study and study["plans"] == 60


def test_the_committed_report_is_of_the_committed_runs(quick, tmp_path):
    """README's table is what the committed run folders say; every one of them is whole."""
    found = finished.read_runs([ROOT / "report" / "runs"])
    assert found.left_out == [] and {"ladder", "minilm"} <= {run.name for run in found.runs}
    readme = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", readme)
    build.build_report([ROOT / "report" / "runs"], tmp_path / "out", readme)
    assert readme.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    committed = (ROOT / "report" / "report.html").read_text(encoding="utf-8")
    for run in found.runs:
        assert f"{run.result['log_loss']:.4f}" in committed, run.name


def test_template_that_names_what_is_not_there(tmp_path):
    (tmp_path / "t.md").write_text("{{ nothing }}", encoding="utf-8")
    with pytest.raises(UserError, match="nothing"):
        build.fill_template(tmp_path / "t.md", {})
