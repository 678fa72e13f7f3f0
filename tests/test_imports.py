"""The rooms of the library: who may know whom, what stays light, and that everything public says what it is."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefcls_lib

ROOT = Path(prefcls_lib.__file__).parent.parent
ROOMS = {path.stem: path for path in sorted((ROOT / "prefcls_lib").glob("*.py"))}
# From the ground up: a room imports only rooms that stand before it.
ORDER = (
    "schema", "files", "progress", "config", "environment", "data", "features", "tokenization", "batching",
    "backbones", "model", "reward", "checkpoint", "optim", "schedule", "resume", "distributed", "predict",
    "metrics", "collapse",
    "step", "train", "calibration", "rungs", "baselines",
    "submission", "runs", "plots", "job", "processes", "members", "pipeline", "ladder", "blend", "ensemble",
    "specification", "page", "finished", "tables", "report", "machine", "doctor", "cli", "__main__",
)  # fmt: skip
LIGHT = ("schema", "files", "progress", "config", "data", "features", "metrics", "calibration", "rungs", "baselines",
         "submission", "runs", "plots", "specification", "page", "finished", "tables", "report", "cli")  # fmt: skip


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports anywhere; `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def run_python(code: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_room_has_its_place():
    """A new room must be put into the order here, and into the picture at the top of the package."""
    assert set(ORDER) == set(ROOMS) - {"__init__"}
    words = set(re.findall(r"\w+", prefcls_lib.__doc__))
    assert set(ROOMS) - {"__init__", "__main__"} <= words


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_down(room):
    """No room knows one that stands above it, and none knows the notebooks or the folder kaggle."""
    allowed = {f"prefcls_lib.{name}" for name in ORDER[: ORDER.index(room)]}
    for name in imported_modules(ROOMS[room]):
        top, *below = name.split(".")
        assert top not in ("notebooks", "kaggle", "tests")
        if top == "prefcls_lib" and below:
            assert ".".join((top, below[0])) in allowed, f"{room} imports {name}"


def test_package_itself_imports_nothing():
    """`import prefcls_lib` costs nothing: every room is imported by its name."""
    assert imported_modules(ROOMS["__init__"]) == set()


def test_light_rooms_do_not_import_torch(tmp_path):
    """Rows, metrics, baselines and files work at once, and where torch is not installed."""
    code = (
        f"import sys\nfor room in {LIGHT}: __import__('prefcls_lib.' + room)\n"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])"
    )
    assert run_python(code, tmp_path, PYTHONPATH=str(ROOT)) == "[]"


def test_kaggle_client_is_found_beside_the_folder_of_that_name(tmp_path):
    """From the root of the repository `import kaggle` is the installed client: the folder has no __init__.py."""
    assert not (ROOT / "kaggle" / "__init__.py").exists()
    client = tmp_path / "kaggle" / "__init__.py"
    client.parent.mkdir()
    client.write_text("", encoding="utf-8")
    assert run_python("import kaggle; print(kaggle.__file__)", ROOT, PYTHONPATH=str(tmp_path)) == str(client)


def public_definitions(body: list[ast.stmt], inside: str = ""):
    """(dotted name, node) of every public function, class and method."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield inside + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{inside}{node.name}.")


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_everything_public_has_a_docstring(room):
    """Each room, class, function and method that others may use says in its first line what it is."""
    tree = parse(ROOMS[room])
    assert ast.get_docstring(tree), room
    missing = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert missing == []
