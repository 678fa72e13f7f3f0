"""`make kaggle-rehearsal`: the network is off, the rows are irregular, and what it needs."""

import sys

import layout
import pytest
import rehearse
import rows

from prefcls_lib.data import loading
from prefcls_lib.data.schema import TEXT_COLUMNS
from prefcls_lib.runtime.files import UserError

PROBE = """
import importlib.util, socket, sitecustomize
assert "offline" in sitecustomize.__file__, "sitecustomize is not the rehearsal's"
try:
    socket.create_connection(("192.0.2.1", 80), 5)
    raise SystemExit("the network is not off")
except OSError as error:
    assert "a rehearsal has no network" in str(error), error
found = importlib.util.find_spec("prefcls_lib")
assert found is None or "site-packages" in found.origin, f"the library is on the path: {found.origin}"
"""


def test_every_python_of_a_rehearsal_is_offline(tmp_path, monkeypatch):
    """The guard is not believed but checked: it holds, also in a subprocess, and without it the probe fails."""
    step = rehearse.make_step(tmp_path / "step", {}, loading.sample_path("test"))
    child = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {PROBE!r}]).returncode)"
    rehearse.run_offline([sys.executable, "-c", child], step, "the probe")
    monkeypatch.setattr(rehearse, "OFFLINE", tmp_path)
    with pytest.raises(UserError, match=r"the probe: failed with exit code 1:(.|\n)*sitecustomize"):
        rehearse.run_offline([sys.executable, "-c", PROBE], step, "the probe")


def test_a_step_has_kaggles_files_and_variables(tmp_path):
    """Inputs without what the client keeps back; the variables of a Kaggle machine and no others of ours."""
    source = tmp_path / "source"
    source.mkdir()
    for name in (layout.METADATA, "a.txt"):
        (source / name).write_text("x")
    step = rehearse.make_step(tmp_path / "step", {"datasets/me/prefcls-lib": source}, loading.sample_path("test"))
    competition = "competitions/llm-classification-finetuning"
    found = layout.list_files(step / "input")
    assert found == [f"{competition}/test.csv", f"{competition}/train.csv", "datasets/me/prefcls-lib/a.txt"]
    assert len(loading.read_rows(step / "input" / competition / "train.csv", labelled=True)) == rehearse.TRAIN_ROWS
    code = (
        "import os; from prefcls_lib.runtime import kaggle\n"
        "assert kaggle.on_kaggle() and kaggle.run_folder('auto', 'x') == __import__('pathlib').Path.cwd()\n"
        "assert not any(name.startswith('PREFCLS') for name in os.environ if name != 'PREFCLS_INPUT_ROOT')"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(layout.ROOT)!r})\n{code}"]
    rehearse.run_offline(command, step, "code")


def test_irregular_rows_hold_every_case_and_are_read(tmp_path):
    """What has broken submissions: nulls, 36 turns, 50,000 characters, surrogates, scripts, ids up to 2^32."""
    made = rows.make_rows(800)
    assert made == rows.make_rows(800)
    rows.write_rows(tmp_path / "test.csv", made)
    text = (tmp_path / "test.csv").read_bytes().decode("ascii")
    signs = ("[null", r"\ud83d of a pair", r"\u8bf7", r"\u0623", r"\u202e", "<\\/s>", r"\u0000", ",[]\r\n", '"[""""]"')
    for sign in signs:
        assert sign in text, sign
    read = loading.read_rows(tmp_path / "test.csv", labelled=False)
    assert len(read) == read["id"].nunique() == 800
    assert read["id"].astype(int).max() == 2**32
    assert read["prompt"].map(len).max() == 36
    longest = [max(len(turn) for turns in read[name] for turn in turns) for name in TEXT_COLUMNS]
    assert min(longest[0], longest[2]) >= 50_000
    same = [a == b and a != [""] for a, b in zip(read["response_a"], read["response_b"], strict=True)]
    assert sum(same) >= 1


def test_without_a_bundle(tmp_path, monkeypatch, capsys):
    """It must be built first."""
    monkeypatch.setattr(layout, "DIST", tmp_path)
    assert rehearse.main([]) == 2
    assert "make kaggle-bundle OWNER=me" in capsys.readouterr().err
