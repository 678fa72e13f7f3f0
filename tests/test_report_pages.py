"""The report as it is read: its pages in print, and the page in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import ROWS, edit_json, no_figures, quick, read_page, write_run  # noqa: F401

from report import build, page, read_runs

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list]:
    """The report of the committed run folders and README's table, built here: its folder, its layout in print."""
    out, documents, lay_out = tmp_path_factory.mktemp("report"), [], page.lay_out
    shutil.copyfile(ROOT / "README.md", out / "README.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "lay_out", lambda text: documents.append(lay_out(text)) or documents[0])
        build.build_report([ROOT / "report" / "runs"], out, out / "README.md")
    return out, documents


@pytest.fixture(scope="module")
def committed(built) -> Path:
    """Its folder."""
    return built[0]


def test_at_most_twelve_pages_and_all_but_the_last_two_thirds_full(built):
    if not built[1]:
        pytest.skip("WeasyPrint does not start: Pango is missing")
    filled = []
    for one in built[1][0].pages:
        paper = one._page_box
        boxes = [box for box in paper.children[0].descendants() if not getattr(box, "children", None)]
        ends = [box.position_y + box.height for box in boxes if box.height != "auto"]
        filled.append((max(ends) - paper.content_box_y()) / paper.height)
    assert 1 < len(filled) <= 12
    assert [share for share in filled[:-1] if share < 2 / 3] == []


def test_the_committed_report_is_of_the_committed_runs(committed):
    """README's table is what the committed run folders say; every one of them is whole."""
    found = read_runs.read_runs([ROOT / "report" / "runs"], ROWS)
    assert found.left_out == [] and {"ladder", "minilm"} <= {run.name for run in found.runs}
    assert (committed / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    text = (ROOT / "report" / "report.html").read_text(encoding="utf-8")
    assert [run.name for run in found.runs if f"{run.result['log_loss']:.4f}" not in text] == []


def test_every_reference_has_its_number(committed):
    """No `[figure NAME]` is left over, links inside the page have targets, the text refers to each figure and table."""
    text = (committed / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"\[(?:figure|table) [\w-]*\]", text) == []
    links, targets = set(re.findall(r'href="#([^"]+)"', text)), set(re.findall(r' id="([^"]+)"', text))
    assert links <= targets
    assert {name for name in targets if name.startswith(("figure-", "table-"))} <= links


def test_built_twice_the_bytes_are_the_same(committed, tmp_path):
    """In another process, with other hashes of texts; the PDF of the same page is tested elsewhere."""
    code = f"from report import build, page; page.write_pdf = lambda *_: None; build.main(['--out', {str(tmp_path)!r}])"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert (committed / "report.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def abstract(text: str) -> str:
    return text.split('<div class="abstract">')[1].split("</div>")[0]


@pytest.mark.usefixtures("quick")
def test_a_foreign_run_changes_no_sentence_that_is_not_about_it(committed, tmp_path):
    """Beside the committed ones, on the same rows and on others; alone, no committed run is named."""
    own, foreign = ROOT / "report" / "runs", tmp_path / "foreign"
    shutil.copytree(own / "minilm", foreign / "a-foreign-run")
    edit_json(foreign / "a-foreign-run" / "result.json", log_loss=0.9, flip_rate=0.2)
    alone = write_run(tmp_path / "alone" / "on-other-rows")
    build.build_report([own, foreign, alone], tmp_path / "with")
    before, after = ((folder / "report.html").read_text(encoding="utf-8") for folder in (committed, tmp_path / "with"))
    assert abstract(before) == abstract(after)
    for title in ("Appendix B: Slices", "Confidence of minilm against accuracy"):
        assert title in before and title in after
    text = read_page(alone.parent, tmp_path / "out")
    assert "minilm-cross" not in text and "770 shipped rows" not in text and "Slices" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(committed, tmp_path):
    """No error in the console, no horizontal scrolling at 320 and 1,280 px, and a click on a header sorts."""
    text = json.dumps((committed / "report.html").read_text(encoding="utf-8")).replace("</", "<\\/")
    driver, page = tmp_path / "driver.html", (ROOT / "tests" / "report_driver.html").read_text(encoding="utf-8")
    driver.write_text(page.replace("const errors", f"const report = {text};\nconst errors", 1), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", driver.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)[1]))
    assert found["errors"] == []
    assert found["320"] <= 320 and found["1280"] <= 1280
    (up, *rising), (down, *falling) = found["up"], found["down"]
    assert (up, down) == ("ascending", "descending")
    assert len(rising) > 10 and rising == sorted(rising) and falling == sorted(rising, reverse=True)
