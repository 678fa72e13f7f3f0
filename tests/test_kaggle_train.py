"""`make kaggle-train`, `kaggle-watch`: the real client against a scripted server, from an empty dist/ to a report."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import follow
import pytest
import train
from conftest import check, read_tree
from kaggle_stand_in import CANCELLED, COMPLETE, KEY, NOT_FOUND, OWNER, PROGRESS, QUEUED, RUNNING, fill_disk, quota

from prefcls_lib.config import RunConfig
from prefcls_lib.runtime.files import UserError
from report import build

NAME = "02-roberta-base"
KERNEL = f"{OWNER}/prefcls-{NAME}"
WATCH = f"make kaggle-watch OWNER={OWNER} NOTEBOOK={NAME}"

pytestmark = pytest.mark.usefixtures("naps")


@pytest.fixture
def place(tmp_path, tiny, server) -> Path:
    """A folder with backbone/, and runs/ with nothing in it; the server has no kernel, and the one that is pushed ends
    at once, without an output."""
    shutil.copytree(tiny, tmp_path / "backbone")
    (tmp_path / "runs").mkdir()
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, COMPLETE]
    return tmp_path


@pytest.fixture
def run(place, capfd):
    """run(*arguments, notebook=, owner=) -> (exit code, stdout, stderr) of `make kaggle-train`."""

    def call(*arguments: str, notebook: str = NAME, owner: str = OWNER) -> tuple[int, str, str]:
        places = ["--runs", str(place / "runs"), "--backbone", str(place / "backbone")]
        code = train.main([owner, notebook, *places, *arguments])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(autouse=True)
def reports(monkeypatch) -> list[list[str]]:
    """The commands that build a report; they are not run."""
    commands = []
    monkeypatch.setattr(follow, "subprocess", SimpleNamespace(run=lambda command, **_: commands.append(command)))
    return commands


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory, finished_run) -> Path:
    """A run folder as a session leaves it that was killed: one model done, one under way, the kernel's settings."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("fold1", "result.json", "oof.csv"))
    config = json.loads((folder / "config.json").read_text())
    config["settings"] = RunConfig(backbone="backbone", num_seeds=2, max_length=384, num_epochs=1).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoint" / "fold0-seed1").mkdir(parents=True)
    (folder / "checkpoint" / "fold0-seed1" / "state.pt").touch()
    return folder


def injected(server) -> dict:
    """The parameters in the notebook that was pushed."""
    (kernel,) = server.sent("SaveKernel")
    cells = json.loads(kernel["text"])["cells"]
    (source,) = (cell["source"] for cell in cells if "injected-parameters" in cell["metadata"].get("tags", []))
    values: dict = {}
    exec(source, values)
    return {name: value for name, value in values.items() if name != "__builtins__"}


def test_from_an_empty_dist_to_a_run_and_a_report(place, server, run, naps, finished_run, reports, monkeypatch):
    """One command: bundle, quota, data sets that are ready at the third look, kernel, progress, output, report."""
    waiting = [{"status": "BLOBS_RECEIVED"}, {"status": "BLOBS_DECOMPRESSED"}]
    server.script["GetDatasetStatus"] = [*[NOT_FOUND] * 4, *waiting, {"status": "READY"}]
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, QUEUED, QUEUED, RUNNING, RUNNING, COMPLETE]
    server.log = ["nothing to see", PROGRESS]
    server.take_output(finished_run)
    server.page = 7
    _, shown, errors = done = run("--set", "num_epochs=1", "max_length=384")
    assert read_tree(place / "runs" / NAME) == server.output
    assert len(server.sent("ListKernelSessionOutput")) >= 3  # pages
    version = f"version 7 of {KERNEL}"
    check(done, 0, "quota: 30.0 GPU hours left, 11.5 asked for", "prefcls-backbone, version 1: blobs_received",
          "prefcls-lib, version 1: ready", f"{version} was started", "network: backbone",
          f"{version}: queued\n{version}: running\n{PROGRESS}\n{version}: complete\n")  # fmt: skip
    assert "nothing to see" not in shown and KEY not in shown + errors
    assert naps  # it would have waited
    ((_, _, module, *arguments),) = reports
    monkeypatch.setitem(sys.modules, "weasyprint", None)  # no PDF: it takes long
    assert module == "report.build" and build.main(arguments) == 0
    assert (place / "runs" / "report.html").is_file()
    labels = [body.get("versionLabel") for body in server.sent("GetKernelSessionStatus")]
    assert labels == [None, *["v7"] * 5]  # the version that was pushed, not the last one
    assert {body.get("versionLabel") for body in server.sent("ListKernelSessionOutput")} == {"v7"}
    (kernel,) = server.sent("SaveKernel")
    assert (kernel["slug"], kernel["enableInternet"], kernel["isPrivate"]) == (KERNEL, False, True)
    assert kernel["machineShape"] == "NvidiaTeslaT4"
    assert kernel["datasetDataSources"] == [f"{OWNER}/prefcls-lib", f"{OWNER}/prefcls-backbone"]
    assert kernel["competitionDataSources"] == ["llm-classification-finetuning"]
    assert not kernel.get("kernelDataSources")
    wanted = {"backbone": "backbone", "num_seeds": 2, "time_budget_hours": 11.5, "num_epochs": 1, "max_length": 384}
    assert injected(server) == wanted
    methods = [method for method, _ in server.calls]
    assert methods.index("GetAcceleratorQuotaStatistics") < methods.index("CreateDataset") < methods.index("SaveKernel")


def test_quota_that_is_not_told_and_one_that_is_enough(server, run):
    """A new account may get 403; fewer hours fit into what is left. Both start, though without any output."""
    server.script["GetAcceleratorQuotaStatistics"] = [(403, {"message": "Forbidden"}), quota(30, used=26.5)]
    assert "quota: Kaggle does not tell it; 11.5 GPU hours asked for" in run()[1]
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, COMPLETE]
    assert run("--set", "time_budget_hours=3")[0] == 1
    assert len(server.sent("SaveKernel")) == 2


def test_only_what_changed_is_sent_and_its_version_waited_for(place, server, run, naps):
    """The second time nothing; then a new version of the backbone, which is ready and still the old one for a while."""
    run()
    assert {body["slug"] for body in server.sent("CreateDataset")} == {"prefcls-backbone", "prefcls-lib"}
    assert {name for name in server.uploads if "safetensors" in name} == {"model.safetensors"}  # flat
    assert run()[1].count("unchanged since it was sent") == 2
    config = place / "backbone" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.2}))
    naps.clear()
    versions = [{"currentVersionNumber": number} for number in (1, 1, 1, 1, 2, 1)]
    server.script["GetDataset"] = versions  # before the upload of each; then three looks at one, one at the other
    shown = run()[1]
    (sent,) = server.sent("CreateDatasetVersion")
    mark = (place / "dist" / "kaggle" / "datasets" / "prefcls-backbone" / "content.txt").read_text().strip()
    assert (sent["datasetSlug"], sent["body"]["versionNotes"]) == ("prefcls-backbone", mark)
    assert naps[:2] == [30, 30]
    assert "version 2: version 1 is ready, 2 is not yet" in shown


@pytest.mark.parametrize("state", ["FAILED", "REPROCESSING", "SOMETHING_NEW"])
def test_data_set_that_is_never_ready_is_sent_again(server, run, state):
    """An hour, then its state, and nothing is started. It is no dead end: the same command sends it anew."""
    server.script["GetDatasetStatus"] = [*[NOT_FOUND] * 4, {"status": state}]
    words = {"FAILED": "could not unpack it", "SOMETHING_NEW": ": unknown for an hour"}
    why = words.get(state, f": {state.lower()} for an hour")
    check(run(), 2, why, "Run the same command again: it is sent anew")
    assert not server.sent("SaveKernel")
    del server.script["GetDatasetStatus"]
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, COMPLETE]
    run()
    assert [body["datasetSlug"] for body in server.sent("CreateDatasetVersion")] == ["prefcls-backbone"]
    assert len(server.sent("SaveKernel")) == 1


def test_session_that_was_cut_off_is_downloaded_and_gone_on_with(place, server, run, cut_run):
    """Killed at 12 hours with a checkpoint: the same command attaches the old output and names it in resume_from."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, CANCELLED]
    server.take_output(cut_run)
    again = f"make kaggle-train OWNER={OWNER} NOTEBOOK={NAME}"
    check(run("--set", "max_length=384"), 1, "cut off; models done: fold0. Resume it", again)
    folder = place / "runs" / NAME
    assert read_tree(folder) == server.output
    server.calls.clear()
    server.script["GetKernelSessionStatus"] = [CANCELLED, COMPLETE]
    check(run("--set", "max_length=384"), 1, "its output is attached", f"{folder} holds an earlier run and is kept")
    (kernel,) = server.sent("SaveKernel")
    assert kernel["kernelDataSources"] == [KERNEL]
    assert injected(server)["resume_from"] == f"prefcls-{NAME}"
    assert (place / "runs" / f"{NAME}-2" / "config.json").is_file()


def test_cut_off_session_with_other_settings_is_not_overwritten(server, run, cut_run):
    """Named, also where one was set only then; and how to start from the beginning all the same."""
    server.script["GetKernelSessionStatus"] = [CANCELLED]
    server.take_output(cut_run)
    for settings, now in ((["num_epochs=1"], 512), (["max_length=256"], 256)):
        check(run("--set", *settings), 2, f"max_length=384, this command has max_length={now}", "resume_from=none")
    assert not server.sent("SaveKernel")
    run("--set", "max_length=256", "resume_from=none")
    assert injected(server)["resume_from"] is None


def test_kernel_that_fails_shows_its_log_and_what_to_change(place, server, run):
    """The last lines, Kaggle's word, and advice; nothing is downloaded."""
    server.script["GetKernelSessionStatus"] = [NOT_FOUND, RUNNING, {"status": "ERROR", "failureMessage": "it failed"}]
    server.log = [f"line {number}" for number in range(50)] + ["torch.OutOfMemoryError: CUDA out of memory."]
    _, shown, _ = done = run()
    check(done, 1, "failed on Kaggle. it failed", "line 49", "CUDA out of memory", "max_tokens_per_micro_step=2048")
    assert "line 20\n" not in shown
    assert list((place / "runs").iterdir()) == []


@pytest.mark.parametrize("urllib3_compares_lengths", [True, False])
def test_download_that_breaks_off_is_repeated_until_it_is_whole(
    place, server, run, naps, finished_run, monkeypatch, urllib3_compares_lengths
):
    """What is missing of a file is asked for, every byte is right; of a full disk nothing half-downloaded stays."""
    server.take_output(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(follow, "_download", fill_disk)
        check(run(), 2, "No space left on device", "its output is kept", WATCH)
    assert list((place / "runs").iterdir()) == []
    server.script["GetKernelSessionStatus"] = [COMPLETE]
    server.broken = {"oof.csv": 2, "model/fold0/model.safetensors": 1}
    monkeypatch.setattr(follow, "BYTES_AT_ONCE", 100)
    if not urllib3_compares_lengths:  # as before its version 2: half a file is no error
        never = property(lambda response: False, lambda response, value: None)
        monkeypatch.setattr("urllib3.HTTPResponse.enforce_content_length", never, raising=False)
    check(run("--watch"), 0)
    assert read_tree(place / "runs" / NAME) == server.output
    assert [line.split()[0] for line in server.ranges].count("oof.csv") == 2
    assert 5 in naps


def test_too_many_requests_are_waited_for_as_told(place, server, run, naps, monkeypatch):
    """429 with Retry-After. With VERBOSE=1 the client prints every request, and still nothing secret is shown."""
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "args", ["--local", "--verbose"])
    server.script["SaveKernel"] = [(429, {"message": "slow down"}, {"Retry-After": "77"}), {"versionNumber": 8}]
    _, shown, errors = run()
    assert 77 in naps and "version 8 of" in shown and "Authorization" not in shown + errors
    assert not any(KEY.encode() in content for content in read_tree(place).values())


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [("SaveKernel", (409, {"message": "The slug is in use"}), ["409", "slug is in use", "Rename or delete"]),
     ("SaveKernel", (403, {"message": "Forbidden"}), ["phone is not verified", "/phone", "/rules", "expired"]),
     ("SaveKernel", {"versionNumber": 9, "invalidCompetitionSources": ["llm-classification-finetuning"]},
      [f"version 9 of {KERNEL} was started without llm-classification-finetuning", "/rules", "keeps running there",
       WATCH]),
     ("GetAcceleratorQuotaStatistics", (401, {"message": "Unauthenticated"}), ["expired", "Make a token"]),
     ("GetAcceleratorQuotaStatistics", quota(30, used=26.5),
      ["may take 11.5 GPU hours", "has 3.5 left. Nothing was uploaded", "time_budget_hours=3.4"]),
     ("GetAcceleratorQuotaStatistics", quota(30, used=15, reserved=11.5),
      ["has 3.5 left, beside 11.5 that running kernels reserve", "wait for their end"]),
     ("CreateDataset", {"status": "error", "error": "title is taken"}, ["title is taken", "Nothing was started"]),
     ("GetKernelSessionStatus", RUNNING, [f"{KERNEL} is running on Kaggle", "Nothing was started", WATCH])],
)  # fmt: skip
def test_refusals_of_the_server(server, run, method, answer, words):
    """One message each, exit code 2; what was started is named. Nobody pays twice for a kernel that runs."""
    server.script[method] = [answer]
    _, _, errors = done = run("--set", "resume_from=none")
    check(done, 2, *words)
    assert ("keeps running there" in errors) == ("keeps running there" in words)
    assert bool(server.sent("SaveKernel")) == (method == "SaveKernel")
    assert bool(server.sent("CreateDataset")) == (method in ("SaveKernel", "CreateDataset"))


def test_finished_run_that_is_not_here_is_fetched_before_another_starts(place, server, run, finished_run):
    """`kaggle-train` refuses, `kaggle-watch` brings it; then another may start, even with a score written into it."""
    server.script["GetKernelSessionStatus"] = [COMPLETE]
    server.take_output(finished_run)
    check(run(), 2, "has finished a run that is not in")
    assert run("--watch")[0] == 0
    assert not server.sent("SaveKernel")
    result = place / "runs" / NAME / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), follow.PUBLIC_SCORE: {"score": 1.0}}))
    check(run(), 2, "Kaggle still shows the output of the run in")  # an old output is not taken for the new one
    assert len(server.sent("SaveKernel")) == 1
    assert run("--runs", str(place / "runs" / "first"))[0] == 0  # kaggle-first knows it, too
    assert run("--watch")[0] == 0
    assert len(list((place / "runs").glob("0*"))) == 1


@pytest.mark.parametrize("name", ["../../outside.txt", "/tmp/outside.txt", "a\0b"])
def test_output_cannot_leave_its_folder(tmp_path, name):
    """A name with .., an absolute one and one that no file system takes are refused."""
    with pytest.raises(UserError) as error:
        follow.fetch_output(None, {name: "address"}, tmp_path / "runs", "run")
    assert f"the output holds {name!r}, which cannot lie in its folder" in str(error.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_extra_rows_are_uploaded_and_named_as_they_are_there(place, server, run, home):
    """Two files, one of them packed: a data set of its own with both unpacked, attached to the kernel."""
    text = (home / "train.csv").read_bytes()
    (place / "votes.csv").write_bytes(text)
    (place / "more.csv.gz").write_bytes(gzip.compress(text))
    check(run("--set", f"extra_train={place / 'votes.csv'},{place / 'more.csv.gz'}"), 1)  # there is no output
    assert injected(server)["extra_train"] == "votes.csv,more.csv"
    (kernel,) = server.sent("SaveKernel")
    assert kernel["datasetDataSources"] == [f"{OWNER}/prefcls-{name}" for name in ("lib", "backbone", "extra")]
    folder = place / "dist" / "kaggle" / "datasets" / "prefcls-extra"
    assert (folder / "votes.csv").read_bytes() == (folder / "more.csv").read_bytes() == text
    assert {path.name for path in folder.iterdir()} == {"votes.csv", "more.csv", "content.txt", "dataset-metadata.json"}


def test_preset_and_set_name_what_is_trained(run, monkeypatch):
    """SET has the last word, `BACKBONE` is uploaded in place of what is named; a preset alone goes to notebook 01."""
    started = []
    monkeypatch.setattr(train, "start", lambda _, kernel, *given: started.append((kernel.name, *given[1:3])))
    monkeypatch.setattr(train, "bring_back", lambda *_: 0)
    for settings, name in (
        (["init_from=a/scorer"], "a/scorer"),
        (["backbone=b/encoder"], "b/encoder"),
        (["init_from=a/scorer", "--preset", "strong"], "a/scorer"),
        (["--preset", "strong"], "OpenAssistant/reward-model-deberta-v3-large-v2"),
        (["init_from=none", "--preset", "strong"], "roberta-base"),
        ([], "roberta-base"),
    ):
        assert train.main([OWNER, NAME, "--set", *settings]) == 0
        _, parameters, uploaded = started[-1]
        assert uploaded == name
        assert Path(name).name.lower() in (parameters.get("init_from"), parameters["backbone"])
    assert run("--preset", "quick", "--set", "max_length=384", "init_from=a/scorer", notebook="")[0] == 0
    notebook, parameters, uploaded = started[-1]
    quick = {"max_length": 384, "num_epochs": 1, "num_seeds": 2, "folds": [0], "time_budget_hours": 1.0}
    assert (notebook, Path(uploaded).name) == ("01-deberta-v3-xsmall", "backbone")
    assert parameters == {"backbone": "backbone", "init_from": "backbone", **quick}


@pytest.mark.parametrize(
    ("owner", "notebook", "settings", "words"),
    [("", NAME, [], ["no OWNER"]),
     (OWNER, NAME, ["extra_train=no.csv"], ["extra_train=no.csv: no such file", "prefcls convert"]),
     (OWNER, NAME, [f"extra_train={__file__},{__file__}"], ["two files have one name"]),
     (OWNER, "", [], ["NOTEBOOK=''", "choose one of 01-deberta-v3-xsmall"]),
     (OWNER, "02-robrta", [], ["NOTEBOOK='02-robrta'", "choose one of", NAME]),
     (OWNER, "02_roberta_base", ["num_epoch=1"], ["'num_epoch'", "Did you mean 'num_epochs'?"]),
     (OWNER, NAME, ["num_epochs=many"], ["num_epochs='many'"]),
     (OWNER, NAME, ["out=x"], ["out cannot be set"]),
     (OWNER, NAME, ["num_epochs"], ["SET='num_epochs'", "NAME=VALUE"]),
     (OWNER, NAME, ["--preset", "quik"], ["Did you mean", "quick.yaml?"]),
     ("somebody", NAME, [], ["OWNER=somebody", f"those of {OWNER}"])],
)  # fmt: skip
def test_bad_arguments_ask_nothing_of_kaggle(server, run, owner, notebook, settings, words):
    """One message each."""
    check(run("--set", *settings, notebook=notebook, owner=owner), 2, *words)
    assert server.calls == []
