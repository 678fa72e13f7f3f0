"""`make kaggle-first` against the stand-in: each step, and each assumption of the README with what was seen of it."""

import json
from types import SimpleNamespace

import first
import pytest
from kaggle_stand_in import COMPLETE, ERROR, NOT_FOUND, OWNER, PROGRESS

pytestmark = pytest.mark.usefixtures("naps")


@pytest.fixture
def run(tmp_path, tiny, capfd, monkeypatch):
    """run() -> (exit code, assumptions.json) of `make kaggle-first` with a tiny encoder."""
    monkeypatch.setattr(first.follow, "subprocess", SimpleNamespace(run=lambda *_, **__: None))

    def call() -> tuple[int, dict]:
        code = first.main([OWNER, "--backbone", str(tiny), "--runs", str(tmp_path / "first")])
        found = json.loads((tmp_path / "first" / "assumptions.json").read_text())
        shown = capfd.readouterr().out
        assert all(text in shown and what in shown for text, what in found.items())
        return code, found

    return call


def test_half_an_hour_shows_what_is_true(server, run, finished_run, monkeypatch):
    """Trains, submits, trains with both GPUs; what needs a session that is cut off is said not to be tried."""
    server.take_output(finished_run)
    result = json.loads(server.output["result.json"])
    monkeypatch.setattr(server, "answer", changed(server, result))
    server.script["CreateCodeSubmission"] = [{"message": "Successfully submitted", "ref": 5}]
    server.script["ListSubmissions"] = [{"submissions": [{"ref": 5, "status": "COMPLETE", "publicScore": "1.01"}]}]
    server.log = ["a line", PROGRESS]
    code, found = run()
    assert code == 0, found
    for assumption, words in (
        ("is unpacked as a folder", f"the library of commit {result['versions']['commit']} ran"),
        ("The log that is followed", "2 lines, 1 of them of progress"),
        ("uses up little quota", "0.00 GPU hours"),
        ("A rerun has", "public score 1.01"),
        ("over NCCL", "tokens a second in"),
        ("does not exist", "none was there"),
        ("that was killed", "not tried here"),
    ):
        assert [words in seen for text, seen in found.items() if assumption in text] == [True], assumption
    assert "not seen" not in found.values()
    pushed = [body["slug"] for body in server.sent("SaveKernel")]
    assert pushed == [f"{OWNER}/prefcls-{name}" for name in first.STEPS]
    third = "".join(cell["source"] for cell in json.loads(server.sent("SaveKernel")[2]["text"])["cells"])
    assert "max_train_rows = 1000" in third and "num_seeds = 1" in third and "time_budget_hours = 0.5" in third


def changed(server, result):
    """The server's answers; a kernel is there once it was pushed, and each has a run of its own."""
    answer = server.answer

    def give(method: str, body: dict) -> tuple:
        pushed = [sent["slug"].split("/")[1] for sent in server.sent("SaveKernel")]
        if method == "GetKernelSessionStatus":
            server.calls.append((method, body))
            return (200, COMPLETE) if body["kernelSlug"] in pushed else NOT_FOUND
        if method == "ListKernelSessionOutput":
            name = body["kernelSlug"]
            server.output["result.json"] = json.dumps({**result, "name": name}).encode()
        return answer(method, body)

    return give


def test_what_was_not_reached_is_said(server, run):
    """The first kernel fails: one line each, and its exit code."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, NOT_FOUND, ERROR]
    code, found = run()
    assert code == 1 and len(server.sent("SaveKernel")) == 1
    assert list(found.values()).count("not seen") == 8
