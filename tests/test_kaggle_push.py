"""`make kaggle-push`: the real Kaggle client against a stand-in server, and what it sent."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from kaggle_parts import OWNER, build_tiny_bundle, layout
from kaggle_parts import push as push_script


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny) -> Path:
    return build_tiny_bundle(tmp_path_factory.mktemp("push") / "kaggle", tiny)


@pytest.fixture
def push(capsys):
    """push(bundle, *arguments, owner=OWNER) -> (exit code, stdout, stderr)"""

    def run(bundle: Path, *arguments: str, owner: str = OWNER) -> tuple[int, str, str]:
        code = push_script.main([owner, "--bundle", str(bundle), *arguments])
        return code, *capsys.readouterr()

    return run


def test_data_sets_are_created_then_only_a_change_makes_a_version(bundle, server, push):
    """First push creates all; a second does nothing; a changed data set gets a new version with the commit's name."""
    record = bundle.with_name("kaggle-pushed.json")
    code, _, errors = push(bundle)
    assert code == 0, errors
    created = {body["slug"]: body for body in server.sent("CreateDataset")}
    assert set(created) == {"prefcls-lib", "prefcls-backbones"}
    assert created["prefcls-lib"]["licenseName"] == "apache-2.0"
    assert all(body["isPrivate"] for body in created.values())
    assert len(created["prefcls-lib"]["files"]) == 3  # wheel, README and the folder
    names = zipfile.ZipFile(io.BytesIO(server.uploads["prefcls_lib.zip"])).namelist()
    folder = bundle / "datasets" / "prefcls-lib" / "prefcls_lib"
    assert sorted(names) == layout.list_files(folder)
    assert push(bundle)[1].count("unchanged since the last push") == 2
    pushed = json.loads(record.read_text())
    record.write_text(json.dumps({**pushed, f"{OWNER}/prefcls-lib": "of another build"}))
    assert push(bundle)[0] == 0
    (version,) = server.sent("CreateDatasetVersion")
    assert version["datasetSlug"] == "prefcls-lib"
    assert version["body"]["versionNotes"] == layout.read_manifest(bundle)["commit"]


def test_named_kernels_are_pushed_and_a_version_is_submitted(bundle, server, push):
    """The kernel that Kaggle gets has no internet, a T4, its sources, and the parameters in its text."""
    server.data_sets |= {f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-backbones"}
    code, _, errors = push(bundle, "--kernels", "02-roberta-base", "--submit", "3")
    assert code == 0, errors
    (kernel,) = server.sent("SaveKernel")
    assert kernel["slug"] == f"{OWNER}/prefcls-02-roberta-base"
    assert kernel["enableInternet"] is False
    assert kernel["isPrivate"] is True
    assert kernel["machineShape"] == "NvidiaTeslaT4"
    assert kernel["datasetDataSources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-backbones"]
    assert kernel["competitionDataSources"] == ["llm-classification-finetuning"]
    tags = {tag: c["source"] for c in json.loads(kernel["text"])["cells"] for tag in c["metadata"].get("tags", [])}
    assert 'backbone = "backbone"' in tags["injected-parameters"]
    (submitted,) = server.sent("CreateCodeSubmission")
    assert (submitted["kernelSlug"], submitted["kernelVersion"]) == ("prefcls-submit", 3)
    assert submitted["fileName"] == "submission.csv"


def test_failure_that_the_client_hides_is_reported(bundle, server, push):
    """An answer with code 200 that holds an error."""
    server.data_sets |= {f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-backbones"}
    server.script["SaveKernel"] = [{"error": "quota used up"}]
    code, _, errors = push(bundle, "--kernels", "submit")
    assert code == 2
    assert "quota used up" in errors


@pytest.mark.parametrize(
    ("owner", "arguments", "words"),
    [
        ("", [], ["no OWNER", "make kaggle-bundle OWNER=me"]),
        ("someone-else", [], ["OWNER=tester", "someone-else"]),
        (OWNER, ["--kernels", "04-bert"], ["04-bert", "02-roberta-base"]),
    ],
)
def test_bad_input_uploads_nothing(bundle, server, push, owner, arguments, words):
    """One message, and the server hears nothing."""
    code, _, errors = push(bundle, *arguments, owner=owner)
    assert code == 2
    assert all(word in errors for word in words), errors
    assert server.calls == []


def test_tampered_bundle_is_not_uploaded(bundle, server, push, tmp_path):
    """The manifest is compared before anything is sent."""
    copy = tmp_path / "dist" / "kaggle"
    shutil.copytree(bundle, copy)
    with (copy / "datasets" / "prefcls-lib" / "README.md").open("a") as file:
        file.write("!")
    code, _, errors = push(copy)
    assert code == 2
    assert "datasets/prefcls-lib/README.md: was changed" in errors
    assert server.calls == []
