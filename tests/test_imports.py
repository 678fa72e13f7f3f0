"""The packages of the library: which imports which, what stays light, and how long they are."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import prefcls_lib

ROOT = Path(prefcls_lib.__file__).parent.parent
LIBRARY = ROOT / "prefcls_lib"
MODULES = {
    ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(LIBRARY.rglob("*.py"))
}
# In import order: a package (or a module beside the packages) imports only from those that stand before it.
ORDER = ("runtime", "config", "data", "evaluation", "baselines", "models", "training", "pipeline", "ensemble",
         "doctor", "cli", "__main__")  # fmt: skip
LIGHT = (
    "runtime.files", "runtime.progress", "config", "data.schema", "data.loading", "data.features", "data.submission",
    "data.splits", "evaluation.scores", "evaluation.compare", "evaluation.slices", "evaluation.calibration",
    "evaluation.plots",
    "baselines.estimators", "baselines.out_of_fold", "pipeline.folder", "ensemble.blend", "cli",
)  # fmt: skip

# A reader's time is the budget. The lines that are there, which may only fall, beside those that the plan allows.
# CORE: what a student reads.
MOST_LINES = {
    "runtime": (370, 370), "config": (174, 175), "data": (1022, 1090), "evaluation": (598, 625),
    "baselines": (677, 755), "models": (695, 800), "training": (618, 650), "pipeline": (934, 930),
    "ensemble": (383, 290), "doctor": (269, 290),
    "cli": (164, 170), "the core": (2027, 2500), "the library": (5942, 6200),
    "report": (526, 530), "report/studies": (1445, 1450), "kaggle": (1591, 1600), "tests": (7906, 8000),
}  # fmt: skip
CORE = ("data.loading", "data.splits", "data.features", "data.tokenization", "data.batching", "baselines.estimators",
        "baselines.out_of_fold", "models.recipes", "models.network", "models.predict", "training.optim",
        "training.step", "training.loop", "evaluation.scores", "data.submission", "pipeline.steps")  # fmt: skip
MOST_MODULE_LINES = 300
MOST_FUNCTION_LINES = 60
STILL_LONG = set()


@functools.cache
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


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_every_package_has_its_place():
    """A new package must be put into the order here, and into the docstring at the top of the library."""
    assert set(ORDER) == {package_of(name) for name in MODULES} - {"__init__", "sample"}
    words = set(re.findall(r"\w+", prefcls_lib.__doc__))
    assert set(ORDER) - {"__main__", "cli"} <= words


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in ORDER])
def test_imports_point_back(module):
    """No module knows a package that stands behind its own, and none knows the notebooks or the folder kaggle."""
    here = package_of(module)
    allowed = {*ORDER[: ORDER.index(here)], here}
    for name in imported_modules(MODULES[module]):
        top, *below = name.split(".")
        assert top not in ("notebooks", "kaggle", "tests")
        if top == "prefcls_lib" and below:
            assert below[0] in allowed or below == ["__version__"], f"{module} imports {name}"


@functools.cache
def names_defined_in(module: str) -> set[str]:
    """Functions, classes and variables at the top of a module of the library; not what it imports."""
    body = parse(MODULES[module]).body
    targets = [target for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]  # fmt: skip
    names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names | {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


FILES = [*(ROOT / "notebooks").glob("0*.py"), ROOT / "kaggle" / "submit_notebook.py",
         *(ROOT / "report").rglob("*.py"), *MODULES.values()]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_name_is_taken_from_the_module_that_defines_it(path):
    """`from prefcls_lib.pipeline import steps` and then `steps.Job` would break when steps no longer imports Job."""
    everywhere, wrong = {}, []  # name of each imported module of the library -> what it defines
    for statement in parse(path).body:
        modules = dict(everywhere)
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prefcls_lib."):
                source = node.module.removeprefix("prefcls_lib.")
                for alias in node.names:
                    if (module := f"{source}.{alias.name}") in MODULES:
                        modules[alias.asname or alias.name] = names_defined_in(module) | {"__file__"}
                    elif alias.name not in names_defined_in(source):
                        wrong.append(module)
        everywhere = modules if isinstance(statement, ast.ImportFrom) else everywhere
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                wrong += [f"{node.value.id}.{node.attr}"] * (node.attr not in modules[node.value.id])
    assert wrong == []


@pytest.mark.parametrize("package", ORDER[:-2])
def test_package_docstring_names_its_modules(package):
    """A package says what is in it; it imports nothing, so that a module of it loads no other."""
    if package == "config":
        return
    path = MODULES[package]
    words = set(re.findall(r"\w+", ast.get_docstring(parse(path))))
    assert {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")} <= words
    assert imported_modules(path) == set()


def test_light_modules_do_not_import_torch(tmp_path):
    """Rows, metrics, baselines and files work at once, and without torch; the package itself imports nothing."""
    code = (
        "import sys, prefcls_lib\nassert not {'numpy', 'prefcls_lib.config'} & set(sys.modules)\n"
        f"for name in {LIGHT}: __import__('prefcls_lib.' + name)\n"
        "assert not {'torch', 'transformers', 'accelerate', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def count_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_no_package_outgrows_its_line_budget():
    """The table holds today's lines: a package that grows fails here, and one that has become smaller lowers it."""

    def count(*names: str) -> int:
        inside = [path for module, path in MODULES.items() if f"{module}.".startswith(tuple(f"{n}." for n in names))]
        return count_lines(inside)

    lines = {package: count(package) for package in ORDER[:-1]}
    lines |= {"the core": count(*CORE), "the library": count(*MODULES)}
    lines |= {place: count_lines((ROOT / place).rglob("*.py")) for place in ("report/studies", "kaggle", "tests")}
    lines["report"] = count_lines((ROOT / "report").glob("*.py"))
    assert set(lines) == set(MOST_LINES)
    assert {name: count for name, count in lines.items() if count > MOST_LINES[name][0]} == {}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_and_functions_fit_on_few_pages(module):
    """No module is longer than 300 lines and no function longer than 60."""
    count = count_lines([MODULES[module]])
    long = {module: count} if count > MOST_MODULE_LINES else {}
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
            long[f"{module}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert set(long) <= STILL_LONG, long
