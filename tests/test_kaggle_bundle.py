"""What is sent to Kaggle: its content, equal bytes, and what is refused."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import backbone
import bundle
import layout
import nbformat
import pytest
import torch
import train
from conftest import read_tree
from kaggle_stand_in import OWNER, fill_disk, write_small_library
from safetensors.torch import load_file, save_file

from prefcls_lib.models.reward import load_reward_model
from prefcls_lib.runtime.files import UserError

KERNELS = ("kernels/02-roberta-base", "kernels/submit")


def build(folder: Path) -> int:
    """`make kaggle-bundle` into `folder`/kaggle, with the encoder in `folder`/backbone; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "DIST", folder / "kaggle")
        return train.main([OWNER, "02-roberta-base", "--build", "--backbone", str(folder / "backbone")])


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny) -> Path:
    """A bundle."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny, folder / "backbone")
    assert build(folder) == 0
    return folder / "kaggle"


def test_a_bundle_holds_what_kaggle_needs(built):
    """Library, backbone and two kernels; every name and every kind of file is one that an upload leaves as it is."""
    files = layout.list_files(built)
    assert {path.rpartition("/")[0] for path in files if path.startswith("kernels/")} == set(KERNELS)
    assert sorted(path.name for path in (built / "datasets").iterdir()) == ["prefcls-backbone", "prefcls-lib"]
    found = sorted(path.name for path in (built / "datasets" / "prefcls-backbone").iterdir())
    assert found == ["config.json", "content.txt", "dataset-metadata.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"]  # fmt: skip
    for name in files:
        assert re.fullmatch(r"[A-Za-z0-9._/-]+", name), name
        assert not name.endswith((".zip", ".gz", ".tar", ".pt", ".pth", ".bin", ".pyc")), name
        assert not (built / name).is_symlink()
    for kernel in KERNELS:
        (path,) = (built / kernel).glob("*.ipynb")
        assert path.stat().st_size < 1_000_000
        text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        assert not re.search(r"""["'](/(?!kaggle)\w|[A-Z]:\\|~/)""", text)
    # what the client does not check before it uploads: slugs, titles, one licence, internet off, private, two T4
    found = [json.loads(path.read_text()) for path in built.glob("*/*/*-metadata.json")]
    for metadata in found:
        owner, slug = metadata["id"].split("/")
        assert (owner, re.sub("[^a-z0-9]+", "-", metadata["title"].lower())) == (OWNER, slug)
        assert 6 <= len(slug) <= 50
    licences = [metadata["licenses"] for metadata in found if "licenses" in metadata]
    assert sorted(licences, key=str) == [[{"name": "apache-2.0"}], [{"name": "other"}]]
    wanted = {"language": "python", "kernel_type": "notebook", "enable_internet": False, "is_private": True,
              "machine_shape": "NvidiaTeslaT4"}  # fmt: skip
    for kernel in KERNELS:
        metadata = json.loads((built / kernel / "kernel-metadata.json").read_text())
        assert wanted.items() <= metadata.items()
        assert (built / kernel / metadata["code_file"]).is_file()
    assert metadata["kernel_sources"] == [f"{OWNER}/prefcls-02-roberta-base"]  # `submit` without runs reads its output
    assert metadata["dataset_sources"] == [f"{OWNER}/prefcls-lib"]


def test_first_cell_stops_where_another_version_is_attached(built, tmp_path, monkeypatch, capsys):
    """Each data set that was sent, in both mounts; another one, two of them, and none stop the notebook."""
    (path,) = (built / "kernels" / "02-roberta-base").glob("*.ipynb")
    cell = nbformat.read(path, as_version=4).cells[0].source
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path / "input"))
    for name, place in (("prefcls-lib", "prefcls-lib"), ("prefcls-backbone", "datasets/me/prefcls-backbone")):
        with pytest.raises(RuntimeError, match=f"another version of {name} is attached: none, sent was"):
            exec(cell, {})
        shutil.copytree(built / "datasets" / name, tmp_path / "input" / place)
    namespace: dict = {}
    exec(cell, namespace)
    assert "prefcls-backbone: {" in capsys.readouterr().out
    assert not [name for name in namespace if not name.startswith("_") and name not in ("os", "Path")]  # no setting
    (tmp_path / "input" / "prefcls-lib" / "content.txt").write_text("89ef 0123\n")
    with pytest.raises(RuntimeError, match=r"another version of prefcls-lib is attached: \{'89ef 0123'\}, sent was"):
        exec(cell, {})


def test_equal_inputs_give_equal_bytes(built, tiny, tmp_path):
    """Another build where one file is changed: another mark of its data set, which the kernel's first cell names."""
    library = layout.read_mark(built / "datasets" / "prefcls-lib")
    commit = layout.library_commit()
    assert library.startswith(f"{commit} ")
    assert (built / "datasets" / "prefcls-lib" / "prefcls_lib" / "commit.txt").read_text() == f"{commit}\n"
    [wheel] = (built / "datasets" / "prefcls-lib").glob("prefcls_lib-*-py3-none-any.whl")
    assert zipfile.Path(wheel, "prefcls_lib/commit.txt").read_text() == f"{commit}\n"
    config = shutil.copytree(tiny, tmp_path / "backbone") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.2}))
    assert build(tmp_path) == 0
    before, after = read_tree(built), read_tree(tmp_path / "kaggle")
    assert set(before) == set(after)
    assert {name for name in after if after[name] != before[name]} == {
        "datasets/prefcls-backbone/config.json", "datasets/prefcls-backbone/content.txt",
        "kernels/02-roberta-base/prefcls-02-roberta-base.ipynb",
    }  # fmt: skip


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Path:
    """Bundles go to this folder, with a library of one file."""
    monkeypatch.setattr(layout, "DIST", tmp_path / "kaggle")
    monkeypatch.setattr(bundle, "write_library", write_small_library)
    return tmp_path / "kaggle"


def test_runs_come_with_their_blend(tmp_path, finished_run, quick):
    """A blend.json brings its runs, names them as they lie beside it, and `submit` gets them."""
    blend = tmp_path / "blend.json"
    state = {"runs": [str(finished_run)], "weights": [1.0], "temperature": 1.5, "tie_bias": 0.0}
    blend.write_text(json.dumps(state))
    bundle.build_bundle(OWNER, runs=[str(blend)])
    runs = quick / "datasets" / "prefcls-runs"
    assert json.loads((runs / "blend.json").read_text()) == {**state, "runs": ["run"]}
    assert {"result.json", "oof.csv", "model/fold1/model.safetensors"} <= set(layout.list_files(runs / "run"))
    submit = json.loads((quick / "kernels" / "submit" / "kernel-metadata.json").read_text())
    assert submit["dataset_sources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-runs"]


def test_pickled_reward_model_keeps_what_scores(tmp_path, reward_folders):
    """Rewritten as safetensors it is still one to start from, weight for weight."""
    source = shutil.copytree(reward_folders["deberta-v2"], tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    backbone.prepare_backbone("reward", source, tmp_path / "out")
    before, after = (load_reward_model(folder, 0.0) for folder in (reward_folders["deberta-v2"], tmp_path / "out"))
    for one, other in zip(before, after, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])


def break_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, next(iter(weights)): torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})


def point_to_lfs(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
    (folder / "model.safetensors").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [(break_weights, ["do not match the architecture"]),
     (point_to_lfs, ["model.safetensors is a Git-LFS pointer", "git lfs pull"]),
     (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["tokenizer.json: cannot be read ("]),
     (shutil.rmtree, ["was not found. Tried:", "folder"]),
     (None, ["No space left on device"])],
)  # fmt: skip
def test_bad_backbone_is_refused_and_the_older_bundle_stays(tiny, tmp_path, quick, monkeypatch, capsys, change, words):
    """One message; nothing half-built; also where the disk fills up."""
    shutil.copytree(tiny, tmp_path / "backbone")
    quick.mkdir()
    (quick / "older").touch()
    monkeypatch.setattr("shutil.copyfile", fill_disk) if change is None else change(tmp_path / "backbone")
    assert build(tmp_path) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} - {"backbone"} == {"kaggle"}
    assert layout.list_files(quick) == ["older"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], ["RUNS", "nowhere", "no finished run"]),
     (["a.json"], ["a.json", "no such file"]),
     (["my run=1"], ["would change the name 'my run=1'"])],
)  # fmt: skip
def test_bad_runs(tmp_path, monkeypatch, finished_run, quick, arguments, words):
    """One message each, and no folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "my run=1")
    with pytest.raises(UserError) as error:
        bundle.build_bundle(OWNER, runs=arguments)
    assert all(word in str(error.value) for word in words), error
    assert not quick.exists()


@pytest.mark.parametrize(
    ("name", "slug"),
    [("microsoft/deberta-v3-xsmall", "deberta-v3-xsmall"), ("~/my/ModernBERT_base+1", "modernbert-base-1"),
     ("a/runs", None), ("x" * 60, None)],
)  # fmt: skip
def test_a_backbone_gives_its_data_set_a_name(name, slug):
    """Small letters, digits and hyphens; none that is taken or too long."""
    if slug:
        assert layout.backbone_slug(name) == slug
    else:
        with pytest.raises(UserError, match="cannot be called"):
            layout.backbone_slug(name)


def test_commit_says_when_the_working_tree_differs(tmp_path):
    """-dirty for a changed and for a new file of the library; outside of git it is an error."""
    with pytest.raises(UserError, match="git clone"):
        layout.library_commit(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "prefcls_lib").mkdir()
    (tmp_path / "prefcls_lib" / "a.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = layout.library_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "notes.txt").write_text("not of the library")
    assert layout.library_commit(tmp_path) == clean
    (tmp_path / "prefcls_lib" / "b.py").write_text("2")
    assert layout.library_commit(tmp_path) == f"{clean}-dirty"
    assert layout.source_files(tmp_path, "prefcls_lib") == ["prefcls_lib/a.py", "prefcls_lib/b.py"]
