"""`make kaggle-submit`: from runs to a public score in result.json, against a scripted server."""

import json
import shutil
import time
from pathlib import Path

import follow
import pytest
import submit as script
from conftest import check
from kaggle_stand_in import COMPLETE, KEY, NOT_FOUND, OWNER, QUEUED, RUNNING

PENDING = {"submissions": [{"ref": 4, "status": "COMPLETE", "publicScore": "9"}, {"ref": 5, "status": "PENDING"}]}
SCORED = {"submissions": [{"ref": 5, "status": "COMPLETE", "publicScore": "0.98765"}]}
UNSCORED = {"submissions": [{"ref": 5, "status": "ERROR", "errorDescription": "Submission Scoring Error"}]}

pytestmark = pytest.mark.usefixtures("naps")


@pytest.fixture
def place(tmp_path, finished_run, server) -> Path:
    """A folder with runs/roberta, a finished run; the server submits, and scores at the second look."""
    shutil.copytree(finished_run, tmp_path / "runs" / "roberta")
    server.script["CreateCodeSubmission"] = [{"message": "Successfully submitted", "ref": 5}]
    server.script["ListSubmissions"] = [PENDING, SCORED]
    server.script["GetKernelSessionStatus"] = [QUEUED, RUNNING, COMPLETE]
    return tmp_path


@pytest.fixture
def submit(place, capfd):
    """submit(*runs) -> (exit code, stdout, stderr) of `make kaggle-submit`; without runs, those of the kernels."""

    def call(*runs: str) -> tuple[int, str, str]:
        code = script.main([OWNER, "--folder", str(place / "runs"), "--runs", *runs])
        return code, *capfd.readouterr()

    return call


def read_result(place: Path) -> dict:
    return json.loads((place / "runs" / "roberta" / "result.json").read_text())


def test_runs_are_uploaded_submitted_and_scored(place, server, submit):
    """From an empty dist/: data sets, kernel without internet, submission of the version that ran, score written."""
    before = read_result(place)
    check(done := submit(str(place / "runs" / "roberta")), 0, "submission 5: pending\nsubmission 5: complete\n"
          "submission 5: public score 0.98765")  # fmt: skip
    assert {body["slug"] for body in server.sent("CreateDataset")} == {"prefcls-lib", "prefcls-runs"}
    (kernel,) = server.sent("SaveKernel")
    assert (kernel["slug"], kernel["enableInternet"]) == (f"{OWNER}/prefcls-submit", False)
    assert kernel["machineShape"] == "NvidiaTeslaT4"
    assert kernel["datasetDataSources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-runs"]
    (submitted,) = server.sent("CreateCodeSubmission")
    assert (submitted["kernelSlug"], submitted["kernelVersion"]) == ("prefcls-submit", 7)
    wanted = {"score": 0.98765, "submission": 5, "runs": ["roberta"]}
    assert read_result(place) == {**before, follow.PUBLIC_SCORE: wanted}
    assert KEY not in done[1] + done[2]
    assert not (place / "dist" / "kaggle-submitted.json").exists()


def test_without_runs_the_training_kernels_outputs_are_read(place, server, submit):
    """Only the kernel whose run is here; nothing of it is uploaded."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, COMPLETE, {"status": "ERROR"}, COMPLETE]
    server.take_output(place / "runs" / "roberta")
    check(submit(), 0)
    (kernel,) = server.sent("SaveKernel")
    assert kernel["kernelDataSources"] == [f"{OWNER}/prefcls-02-roberta-base"]
    assert {body["slug"] for body in server.sent("CreateDataset")} == {"prefcls-lib"}
    assert read_result(place)[follow.PUBLIC_SCORE]["score"] == 0.98765


def test_what_was_begun_is_finished_by_the_same_command(place, server, submit, monkeypatch):
    """Ctrl-C while the kernel runs, and while it is scored: what goes on is named, not sent twice, and finished."""
    server.script["GetKernelSessionStatus"] = [RUNNING, COMPLETE]
    wait = time.sleep

    def press(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", press)
    begun = ([str(place / "runs" / "roberta")], "prefcls-submit keeps running")
    for runs, what in (begun, ([], "submission 5 is being scored")):
        check(submit(*runs), 130, what, f"come back to it: make kaggle-submit OWNER={OWNER}")
    monkeypatch.setattr("time.sleep", wait)
    check(submit(), 0, f"to give it up, interrupt and delete {place / 'dist' / 'kaggle-submitted.json'}")
    assert read_result(place)[follow.PUBLIC_SCORE]["score"] == 0.98765
    assert len(server.sent("CreateCodeSubmission")) == len(server.sent("SaveKernel")) == 1


@pytest.mark.parametrize(
    ("method", "answers", "code", "words", "begun"),
    [("ListSubmissions", [PENDING, UNSCORED], 2, "Submission Scoring Error", False),
     ("ListSubmissions", [{"submissions": []}], 2, "submission 5: unknown for an hour", True),
     # a lost answer is not asked for again: the submission may have arrived
     ("CreateCodeSubmission", [(502, {"message": "bad gateway"})], 2, "bad gateway", True),
     ("GetKernelSessionStatus", [RUNNING, {"status": "ERROR"}], 1, "ValueError: no rows", False)],
)  # fmt: skip
def test_submission_without_a_score(place, server, submit, method, answers, code, words, begun):
    """Kaggle's own words, and nothing is written; where it may still come, what was begun stays noted."""
    server.script[method] = answers
    server.log = ["ValueError: no rows"]
    check(submit(str(place / "runs" / "roberta")), code, words)
    assert follow.PUBLIC_SCORE not in read_result(place)
    assert len(server.sent("CreateCodeSubmission")) == (method != "GetKernelSessionStatus")
    assert (place / "dist" / "kaggle-submitted.json").is_file() == begun


@pytest.mark.parametrize(
    ("runs", "words"), [(["nowhere"], "nowhere holds no finished run"), ([], "Train one, make kaggle-train")]
)
def test_no_run_to_submit(server, submit, runs, words):
    """What is named is none, or no kernel has one; nothing is uploaded."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND]
    check(submit(*runs), 2, words)
    assert {method for method, _ in server.calls} <= {"GetKernelSessionStatus"}
