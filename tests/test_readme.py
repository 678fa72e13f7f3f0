"""The README's Python example prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

from prefcls_lib import cli

README = Path(__file__).parents[1] / "README.md"


def test_python_example_prints_its_numbers(tmp_path, monkeypatch):
    """The command above it, then the example, word for word."""
    text = README.read_text(encoding="utf-8")
    [command] = re.findall(r"^prefcls (ladder .*)$", text, flags=re.MULTILINE)
    code = text.partition("<!-- example: tests/test_readme.py runs it -->")[2]
    code = re.search(r"```python\n(.*?)```", code, flags=re.DOTALL)[1]
    expected = re.findall(r"^# (\[.*)$", code, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().split("\n")[:-1] == expected
