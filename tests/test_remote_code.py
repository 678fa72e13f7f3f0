"""Code that a foreign folder brings is never run, also where the question of transformers is answered with yes."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_arguments

from prefcls_lib import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("setting", ["backbone", "init_from"])
def test_remote_code_is_refused(home, tiny, tmp_path, monkeypatch, capsys, setting):
    """A configuration with auto_map, and `yes` on the standard input: one message, no file CODE_RAN."""
    folder, mark = tmp_path / "foreign", tmp_path / "CODE_RAN"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    assert cli.main(run_arguments(home, tmp_path / "run", f"{setting}={folder}")) == 2
    assert "config.json" in capsys.readouterr().err
    assert not mark.exists()


def test_one_call_loads_what_transformers_reads():
    """`from_pretrained` is called in one place, which forbids code; the model card's example in a message is text."""
    calls = []
    for place in ("prefcls_lib", "kaggle", "report", "notebooks", "figs"):
        for path in sorted((ROOT / place).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            calls += [(path.name, line.strip()) for line in lines if re.search(r"\.from_pretrained\((?!\.\.\.)", line)]
    [(name, line)] = calls
    assert (name, "trust_remote_code=False" in line) == ("backbones.py", True)
