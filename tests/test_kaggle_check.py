"""`python kaggle/check.py DIR`: each rule broken once, and every byte of a bundle against its manifest."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from kaggle_parts import build_tiny_bundle, check, layout


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, finished_run) -> Path:
    """A bundle with a tiny backbone and one run."""
    return build_tiny_bundle(tmp_path_factory.mktemp("check") / "kaggle", tiny, (str(finished_run),))


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """The same, to be broken."""
    return Path(shutil.copytree(built, tmp_path / "kaggle"))


def test_flipping_one_byte_of_any_file_is_caught(copy):
    """Every file, the manifest itself too."""
    for name in layout.list_files(copy):
        path = copy / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        whole = path.read_bytes()
        path.write_bytes(content)
        problems = check.find_problems(copy)
        assert any(path.name in problem for problem in problems), name
        path.write_bytes(whole)
    assert check.find_problems(copy) == []


def test_missing_and_extra_files_are_named(copy):
    """Also a compiled file."""
    (copy / "datasets/prefcls-lib/prefcls_lib/data/loading.py").unlink()
    (copy / "datasets/prefcls-lib/prefcls_lib/__pycache__").mkdir()
    (copy / "datasets/prefcls-lib/prefcls_lib/__pycache__/x.pyc").write_bytes(b"x")
    problems = check.find_problems(copy)
    assert "datasets/prefcls-lib/prefcls_lib/data/loading.py: is missing" in problems
    assert any("__pycache__/x.pyc: is extra" in problem for problem in problems)
    assert any("__pycache__/x.pyc: compiled Python files" in problem for problem in problems)


def test_check_is_a_command(copy):
    """Exit code 0 and 1, one line a problem, no torch."""
    script = [sys.executable, str(layout.ROOT / "kaggle" / "check.py"), str(copy)]
    assert subprocess.run(script, capture_output=True).returncode == 0
    (copy / "extra.txt").write_text("x")
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "extra.txt: is extra, the manifest does not have it\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("weights.zip", b"x", "is an archive"),
        ("train.csv.gz", b"x", "is an archive"),
        ("model.bin", None, "is an archive"),
        ("model.pt", b"x", "torch pickle"),
        ("a+b.txt", b"x", "mangles 'a+b.txt'"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
)
def test_rules_of_data_set_files(copy, name, content, words):
    """What an upload would unpack, mangle or lose."""
    path = copy / "datasets/prefcls-lib" / name
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", "x")
    else:
        path.write_bytes(content)
    (problem,) = check.check_data_set(path.parent)
    assert problem.startswith(f"{name}: ")
    assert words in problem


def test_links_and_size_and_many_files(copy, monkeypatch):
    """Links are lost; limits are Kaggle's."""
    folder = copy / "datasets/prefcls-lib"
    (folder / "link.py").symlink_to("README.md")
    assert check.check_data_set(folder) == ["link.py: is a symbolic link, which an upload loses"]
    assert "link.py: is a symbolic link" in str(check.compare_files(folder, {"link.py": {"size": 1, "sha256": ""}}))
    (folder / "link.py").unlink()
    monkeypatch.setattr(check, "LARGEST_DATA_SET", 1000)
    monkeypatch.setattr(check, "MOST_TOP_FILES", 2)
    assert [problem.split()[0] for problem in check.check_data_set(folder)] == ["holds", "has"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("open('/home/me/train.csv')", "'/home/me/train.csv' is a path of one machine"),
        ("open('C:\\\\data\\\\train.csv')", "is a path of one machine"),
        ("open('~/train.csv')", "is a path of one machine"),
        ("open('/kaggle/input/x/train.csv'), 'a/b', '/', 'https://x.org/y'", None),
        ("import!warnings", "cell 0: is no Python"),
    ],
)
def test_absolute_paths_in_notebooks(tmp_path, source, words):
    """Kaggle's own are fine."""
    cell = nbformat.v4.new_code_cell(f"%matplotlib inline\n{source}")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
    problems = check.check_notebook(tmp_path / "x.ipynb")
    assert problems == [] if words is None else words in problems[0]


def test_library_of_another_commit_is_caught(built):
    """Folder and wheel against the manifest."""
    problems = check.check_commit(built / "datasets/prefcls-lib", "4567")
    assert [("commit.txt" in p, ".whl" in p) for p in problems] == [(True, False), (False, True)]
