"""`make kaggle-bundle`: what is in it, equal bytes, what is kept, what is refused."""

import errno
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from kaggle_parts import OWNER, backbone, build_tiny_bundle, bundle, check, layout
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from prefcls_lib.data.tokenization import SideTokenizer
from prefcls_lib.models.reward import load_reward_model
from prefcls_lib.runtime.files import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, finished_run) -> Path:
    """A bundle with a tiny backbone and one run; for tests that only read it."""
    return build_tiny_bundle(tmp_path_factory.mktemp("bundle") / "kaggle", tiny, (str(finished_run),))


def tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in layout.list_files(folder)}


def test_a_bundle_holds_what_kaggle_needs(built):
    """Library as folder and wheel of one commit, backbone, run, four kernels; and no rule is broken."""
    assert check.find_problems(built) == []
    commit = layout.read_manifest(built)["commit"]
    assert commit == layout.library_commit()
    (wheel,) = (built / "datasets/prefcls-lib").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if name.startswith("prefcls_lib/")}
    folder = built / "datasets/prefcls-lib/prefcls_lib"
    readable = {f"prefcls_lib/{name}": content for name, content in tree(folder).items() if name != "README.md"}
    assert inside == readable  # the README is for those who browse the folder
    assert inside["prefcls_lib/commit.txt"].decode() == f"{commit}\n"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        tree(built / "datasets/prefcls-backbones/backbone")
    )
    assert {"result.json", "oof.csv", "model/fold0/head.safetensors"} <= set(tree(built / "datasets/prefcls-runs/run"))
    kernels = [path.name for path in sorted((built / "kernels").iterdir())]
    assert kernels == ["01-deberta-v3-xsmall", "02-roberta-base", "03-electra-large", "submit"]


def test_kernels_have_parameters_and_sources(built):
    """Papermill's injected cell stands right behind the defaults, and changes nothing but what it must."""
    notebook = nbformat.read(built / "kernels/03-electra-large/prefcls-03-electra-large.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    number = tags.index(["injected-parameters"])
    assert tags[number - 1] == ["parameters"]
    namespace: dict = {}
    exec(notebook.cells[number].source, namespace)
    del namespace["__builtins__"]
    assert namespace == {"backbone": "backbone", "num_seeds": 1, "time_budget_hours": 11.5}
    metadata = json.loads((built / "kernels/submit/kernel-metadata.json").read_text())
    assert metadata["dataset_sources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-runs"]
    assert metadata["kernel_sources"] == []


def test_metadata_follows_kaggles_rules(built):
    """What the client does not check before it uploads: slugs, titles, one licence, internet off, private, two T4."""
    for path in [*built.glob("datasets/*/dataset-metadata.json"), *built.glob("kernels/*/kernel-metadata.json")]:
        metadata = json.loads(path.read_text())
        owner, slug = metadata["id"].split("/")
        assert (owner, re.sub("[^a-z0-9]+", "-", metadata["title"].lower())) == (OWNER, slug)
        assert 6 <= len(slug) <= 50
        if "subtitle" in metadata:
            assert 20 <= len(metadata["subtitle"]) <= 80
            assert metadata["licenses"] in ([{"name": "apache-2.0"}], [{"name": "other"}])
        else:
            assert (metadata["language"], metadata["kernel_type"]) == ("python", "notebook")
            assert (metadata["enable_internet"], metadata["is_private"]) == (False, True)
            assert metadata["machine_shape"] == "NvidiaTeslaT4"
            assert (path.parent / metadata["code_file"]).is_file()


def test_without_runs_submit_reads_the_training_kernels(tmp_path, tiny):
    """Their outputs become its inputs."""
    out = build_tiny_bundle(tmp_path / "kaggle", tiny)
    metadata = json.loads((out / "kernels/submit/kernel-metadata.json").read_text())
    assert metadata["kernel_sources"] == [
        f"{OWNER}/prefcls-{name}" for name in ("01-deberta-v3-xsmall", "02-roberta-base", "03-electra-large")
    ]
    assert not (out / "datasets/prefcls-runs").exists()


def test_equal_inputs_give_equal_bytes_and_unchanged_parts_are_kept(tmp_path, tiny, built, finished_run, capsys):
    """Another folder, a second time: the same files; on the second build of a folder nothing is built again."""
    out = build_tiny_bundle(tmp_path / "kaggle", tiny, (str(finished_run),), anew=True)
    assert tree(out) == tree(built)
    assert capsys.readouterr().out.count(": built,") == 3
    build_tiny_bundle(out, tiny, (str(finished_run),))
    printed = capsys.readouterr().out
    assert printed.count(": unchanged,") == 3
    assert tree(out) == tree(built)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_a_part_that_was_tampered_with_is_built_again(tmp_path, tiny, capsys):
    """Taking over an old part does not carry a change into the new manifest."""
    out = build_tiny_bundle(tmp_path / "kaggle", tiny)
    before = tree(out)
    (out / "datasets/prefcls-backbones/backbone/config.json").write_text("{}")
    capsys.readouterr()
    build_tiny_bundle(out, tiny)
    assert "datasets/prefcls-backbones/backbone: built" in capsys.readouterr().out
    assert tree(out) == before


def test_runs_come_with_their_blend(tmp_path, tiny, finished_run):
    """A blend.json brings its runs, and names them as they lie beside it."""
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"runs": [str(finished_run)], "weights": [1.0], "temperature": 1.0, "tie_bias": 0.0}))
    out = build_tiny_bundle(tmp_path / "kaggle", tiny, (str(blend),))
    assert json.loads((out / "datasets/prefcls-runs/blend.json").read_text())["runs"] == ["run"]
    assert (out / "datasets/prefcls-runs/run/model/fold1/model.safetensors").is_file()


def test_pickled_weights_become_safetensors_and_the_tokenizer_loses_its_limits(tmp_path, backbone_folders):
    """Equal weights, equal token ids, and no truncation or padding baked in."""
    source = Path(shutil.copytree(backbone_folders["electra"], tmp_path / "electra-large"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    assert json.loads((source / "tokenizer.json").read_text())["truncation"] is not None
    backbone.prepare_backbone("electra-large", source, tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(torch.equal(load_file(tmp_path / "out/model.safetensors")[name], w) for name, w in weights.items())
    stored = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert stored["truncation"] is None
    assert stored["padding"] is None
    text = "Where is the nearest station? " * 20
    before, after = (SideTokenizer(AutoTokenizer.from_pretrained(f)) for f in (source, tmp_path / "out"))
    assert before.encode_texts([text])[0].tolist() == after.encode_texts([text])[0].tolist()


def break_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})


def point_to_lfs(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
    (folder / "model.safetensors").write_text(text)


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_weights, ["do not match the architecture"]),
        (point_to_lfs, ["model.safetensors is a Git-LFS pointer", "git lfs pull"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["no tokenizer could be loaded"]),
        (lambda folder: shutil.rmtree(folder), ["was not found. Tried:", "folder"]),
    ],
)
def test_bad_backbone_is_refused_and_the_older_bundle_stays(tmp_path, tiny, change, words, capsys):
    """One message; nothing half-built."""
    out = build_tiny_bundle(tmp_path / "kaggle", tiny)
    before = tree(tmp_path)
    change(tmp_path / "backbone")
    arguments = [OWNER, "--backbones", str(tmp_path / "backbone"), "--out", str(out)]
    assert bundle.main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert {k: v for k, v in tree(tmp_path).items() if k.startswith(("kaggle/", "."))} == {
        k: v for k, v in before.items() if k.startswith("kaggle/")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no OWNER", "make kaggle-bundle OWNER=me"]),
        (["Me_And_You"], ["OWNER='Me_And_You'", "small letters"]),
        ([OWNER, "--backbones"], ["no BACKBONES"]),
        ([OWNER, "--backbones", "minilm", "--runs", "nowhere"], ["RUNS", "nowhere", "no finished run"]),
        ([OWNER, "--backbones", "minilm", "--runs", "a.json"], ["a.json", "no such file"]),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, words):
    """One message each, and no folder."""
    monkeypatch.chdir(tmp_path)
    assert bundle.main([*arguments, "--out", str(tmp_path / "kaggle")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_name_that_kaggle_would_mangle_is_refused(tmp_path, tiny, capsys):
    """Before anything is built."""
    shutil.copytree(tiny, tmp_path / "my model=1")
    assert bundle.main([OWNER, "--backbones", str(tmp_path / "my model=1"), "--out", str(tmp_path / "kaggle")]) == 2
    assert "would mangle the name 'my model=1'" in capsys.readouterr().err


def test_full_disk_leaves_the_older_bundle(tmp_path, tiny, monkeypatch, capsys):
    """The disk fills up while the backbone is copied."""
    out = build_tiny_bundle(tmp_path / "kaggle", tiny)
    before = tree(tmp_path)
    (tmp_path / "backbone" / "README.md").write_text("changed, so it is built again")

    def fill(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backbone.shutil, "copyfile", fill)
    assert bundle.main([OWNER, "--backbones", str(tmp_path / "backbone"), "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "backbone" / "README.md").unlink()
    assert tree(tmp_path) == before


def test_pinned_wheels_of_what_the_image_lacks_lie_beside_the_library(tmp_path, tiny, built, monkeypatch):
    """`pip download` puts them flat into the library's data set, where the notebooks' first cell finds every wheel."""
    (wheel,) = (built / "datasets/prefcls-lib").glob("*.whl")
    shop = tmp_path / "shop"
    shop.mkdir()
    name = "another_library-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(shop / name, "w") as target:
        for entry in source.namelist():
            text = source.read(entry).replace(
                b"Name: prefcls-lib\nVersion: 0.1.0", b"Name: another-library\nVersion: 1.0"
            )
            target.writestr(entry.replace("prefcls_lib-0.1.0", "another_library-1.0"), text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    shutil.copytree(tiny, tmp_path / "backbone")
    out = bundle.build_bundle(OWNER, [str(tmp_path / "backbone")], [], ["another-library==1.0"], tmp_path / "kaggle")
    assert (out / "datasets/prefcls-lib" / name).is_file()
    with pytest.raises(UserError, match="no-such-library"):
        bundle.build_bundle(OWNER, [str(tmp_path / "backbone")], [], ["no-such-library==1.0"], tmp_path / "kaggle")


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
