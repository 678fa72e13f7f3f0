"""`make kaggle-submit`: from runs to a public score in result.json, against a scripted server."""

import json
import shutil
import time
from pathlib import Path

import pytest
from kaggle_parts import OWNER, fetch
from kaggle_parts import submit as script
from kaggle_stand_in import KEY, NOT_FOUND

KERNEL = f"{OWNER}/prefcls-submit"
QUEUED, RUNNING, COMPLETE = ({"status": status} for status in ("QUEUED", "RUNNING", "COMPLETE"))
PENDING = {"submissions": [{"ref": 4, "status": "COMPLETE", "publicScore": "9"}, {"ref": 5, "status": "PENDING"}]}
SCORED = {"submissions": [{"ref": 5, "status": "COMPLETE", "publicScore": "0.98765"}]}

pytestmark = pytest.mark.usefixtures("naps")


@pytest.fixture
def place(tmp_path, finished_run, server) -> Path:
    """A folder with runs/roberta, a finished run; the server submits, and scores at the second look."""
    shutil.copytree(finished_run, tmp_path / "runs" / "roberta")
    server.script["CreateCodeSubmission"] = [{"message": "Successfully submitted", "ref": 5}]
    server.script["ListSubmissions"] = [PENDING, SCORED]
    return tmp_path


@pytest.fixture
def submit(place, capfd):
    """submit(*arguments) -> (exit code, stdout, stderr) of `make kaggle-submit`."""

    def call(*arguments: str, owner: str = OWNER) -> tuple[int, str, str]:
        places = ["--bundle", str(place / "dist" / "kaggle"), "--folder", str(place / "runs")]
        code = script.main([owner, *places, *arguments])
        return code, *capfd.readouterr()

    return call


def public_score(place: Path, name: str = "roberta") -> dict | None:
    return json.loads((place / "runs" / name / "result.json").read_text()).get(fetch.PUBLIC_SCORE)


def test_runs_are_uploaded_submitted_and_scored(place, server, submit):
    """From an empty dist/: data sets, kernel without internet, submission of the version that ran, score written."""
    server.script["GetKernelSessionStatus"] = [QUEUED, RUNNING, COMPLETE]
    before = json.loads((place / "runs" / "roberta" / "result.json").read_text())
    code, shown, errors = submit("--runs", str(place / "runs" / "roberta"))
    assert code == 0, errors
    assert {body["slug"] for body in server.sent("CreateDataset")} == {"prefcls-lib", "prefcls-runs"}
    (kernel,) = server.sent("SaveKernel")
    assert (kernel["slug"], kernel["enableInternet"], kernel["machineShape"]) == (KERNEL, False, "NvidiaTeslaT4")
    assert kernel["datasetDataSources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-runs"]
    (submitted,) = server.sent("CreateCodeSubmission")
    assert (submitted["kernelSlug"], submitted["kernelVersion"]) == ("prefcls-submit", 7)
    assert "submission 5: pending" in shown
    assert "submission 5: public score 0.98765" in shown
    wanted = {"score": 0.98765, "submission": 5, "runs": ["roberta"]}
    assert json.loads((place / "runs" / "roberta" / "result.json").read_text()) == {**before, "public_score": wanted}
    assert KEY not in shown + errors
    assert not (place / "dist" / "kaggle-submitted.json").exists()


def test_without_runs_the_training_kernels_outputs_are_read(place, server, submit):
    """Only the kernel whose run is here; nothing of it is uploaded."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, COMPLETE, {"status": "ERROR"}, COMPLETE]
    server.take_output(place / "runs" / "roberta")
    code, _, errors = submit()
    assert code == 0, errors
    (kernel,) = server.sent("SaveKernel")
    assert kernel["kernelDataSources"] == [f"{OWNER}/prefcls-02-roberta-base"]
    assert {body["slug"] for body in server.sent("CreateDataset")} == {"prefcls-lib"}
    assert public_score(place)["score"] == 0.98765


def test_what_was_begun_is_finished_by_watching(place, server, submit, monkeypatch):
    """Ctrl-C while it is scored: named, not submitted twice, and finished by `make kaggle-watch NOTEBOOK=submit`."""
    server.script["GetKernelSessionStatus"] = [COMPLETE]
    server.data_sets |= {f"{OWNER}/prefcls-{name}": 1 for name in ("lib", "runs")}
    wait = time.sleep

    def press(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", press)
    runs = ("--runs", str(place / "runs" / "roberta"))
    code, _, errors = submit(*runs)
    assert code == 130
    assert "submission 5 is being scored" in errors
    assert f"make kaggle-watch OWNER={OWNER} NOTEBOOK=submit" in errors
    code, _, errors = submit(*runs)
    assert code == 2
    assert "version 7 of the kernel submit" in errors
    monkeypatch.setattr("time.sleep", wait)
    assert submit("--watch")[0] == 0
    assert public_score(place)["score"] == 0.98765
    assert len(server.sent("CreateCodeSubmission")) == 1


def test_submission_that_cannot_be_scored(place, server, submit):
    """Kaggle's own words, exit code 2; nothing is written."""
    server.script["GetKernelSessionStatus"] = [COMPLETE]
    error = {"ref": 5, "status": "ERROR", "errorDescription": "Submission Scoring Error"}
    server.script["ListSubmissions"] = [PENDING, {"submissions": [error]}]
    code, _, errors = submit("--runs", str(place / "runs" / "roberta"))
    assert code == 2
    assert "Submission Scoring Error" in errors
    assert public_score(place) is None


def test_submission_is_not_sent_twice(place, server, submit):
    """An answer that is lost is not asked for again: the submission may have arrived. What was begun stays noted."""
    server.script["GetKernelSessionStatus"] = [COMPLETE]
    server.script["CreateCodeSubmission"] = [(502, {"message": "bad gateway"})]
    code, _, errors = submit("--runs", str(place / "runs" / "roberta"))
    assert code == 2
    assert "bad gateway" in errors
    assert len(server.sent("CreateCodeSubmission")) == 1
    assert (place / "dist" / "kaggle-submitted.json").is_file()


def test_submit_kernel_that_fails(place, server, submit):
    """Its log, and no submission."""
    server.script["GetKernelSessionStatus"] = [RUNNING, {"status": "ERROR", "failureMessage": "it failed"}]
    server.log = ["ValueError: no rows"]
    code, shown, _ = submit("--runs", str(place / "runs" / "roberta"))
    assert code == 1
    assert "ValueError: no rows" in shown
    assert not server.sent("CreateCodeSubmission")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "nowhere"], ["nowhere", "no finished run"]),
        (["--watch"], ["no submission was begun here", "make kaggle-submit"]),
    ],
)
def test_bad_arguments_ask_nothing_of_kaggle(server, submit, arguments, words):
    """One message each."""
    code, _, errors = submit(*arguments)
    assert code == 2
    for word in words:
        assert word in errors, errors
    assert server.calls == []


def test_no_run_to_submit(server, submit):
    """No kernel has one, and none is named."""
    code, _, errors = submit()
    assert code == 2
    assert "Train one, make kaggle-train" in errors
    assert not server.sent("CreateDataset")
