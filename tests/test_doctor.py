"""`prefcls doctor`: each finding, and bad machines told from good ones before anything is spent."""

import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import ElectraConfig

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.doctor import capacity, checks
from prefcls_lib.models.backbones import Backbone, load_backbone
from prefcls_lib.runtime import devices, kaggle
from prefcls_lib.runtime.files import UserError

ROOT = Path(checks.__file__).parents[2]
ELECTRA = ElectraConfig(
    embedding_size=1024, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


@pytest.fixture(autouse=True)
def detached(monkeypatch, tmp_path):
    """Nothing is attached."""
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path / "input"))


@pytest.fixture
def gpu(monkeypatch):
    """gpu(name): a machine with that GPU."""

    def pretend(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(8))

    return pretend


def test_supported_range_is_what_pyproject_and_constraints_say():
    """The floor is the dependency's, the newest is the one that was tested."""
    project = (ROOT / "pyproject.toml").read_text()
    floors = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', project))
    floors["python"] = re.search(r'requires-python = ">=([0-9.]+)"', project)[1]
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    newest = {**tested, "python": "3.13"}
    assert {name: (floors[name], newest[name]) for name in checks.SUPPORTED} == checks.SUPPORTED


@pytest.mark.parametrize(
    ("name", "version", "state", "words"),
    [("python", "3.10.9", "bad", "python>=3.11"), ("python", "3.13.5", "ok", ""),
     ("python", "3.14.0", "note", "python 3.13"), ("transformers", "4.57.1", "bad", "transformers>=5.0"),
     ("transformers", "5.0.0", "ok", ""), ("transformers", "5.23.0+local", "ok", ""),
     ("transformers", "6.1.0", "note", "transformers 5.23.0")],
)  # fmt: skip
def test_packages(name, version, state, words):
    """Too old, the floor, a local build of the newest, newer than tested."""
    installed = {name: newest for name, (_, newest) in checks.SUPPORTED.items()}
    check = checks.check_packages({**installed, name: version})
    assert (check.state, words in check.advice) == (state, True)


def test_a_gpu_without_code_is_found_before_anything_is_spent(gpu, monkeypatch, capsys):
    """is_available() is True for a P100, too."""

    def fail(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    gpu("Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", fail)
    check = checks.check_gpu()
    assert (check.state, "GPU T4 x2" in check.advice) == ("bad", True)
    assert check.finding.startswith("1 x Tesla P100-PCIE-16GB: the first operation fails (CUDA error: no kernel image")
    with pytest.raises(UserError, match="no kernel image"):
        checks.first_look()
    assert cli.main(["doctor"]) == 1 and "not usable as it is" in capsys.readouterr().out


def test_t4_is_fine_and_its_bf16_is_emulated(gpu, monkeypatch):
    """fp16 is used there; on Kaggle, one GPU where there could be two doubles the hours, which is said."""
    gpu("Tesla T4")
    check = checks.check_gpu()
    assert (check.state, check.finding) == ("ok", "1 x Tesla T4, bf16 only emulated: fp16 is used")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    check = checks.check_gpu()
    assert (check.state, check.advice) == ("note", "One GPU; GPU T4 x2 has two.")


@pytest.mark.parametrize(
    ("run_type", "megabytes", "limit", "state"),
    [(None, 184, 0, "note"), ("Batch", 184, 0, "bad"), ("Batch", 184, 2_000, "note"), ("Batch", 2, 0, "note")],
)
def test_no_gpu(tmp_path, monkeypatch, run_type, megabytes, limit, state):
    """On Kaggle a network on all rows would run for half a day; a CPU can do the demo, and all of the baselines."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type) if run_type else None
    with (tmp_path / "train.csv").open("wb") as file:
        file.truncate(megabytes * 1_000_000)
    check = checks.check_gpu(RunConfig(train=str(tmp_path / "train.csv"), max_train_rows=limit))
    assert check.state == state
    assert "phone is not verified" in check.advice
    assert checks.check_gpu().state == "note"  # without a network


def test_disk_by_hand():
    """4 bytes a saved parameter, 32 of two checkpoints: ELECTRA's 334 M fit into 20 GB, not two at a time."""
    assert capacity.disk_bytes(ELECTRA, 1, 0) == pytest.approx(4 * 334e6, rel=0.01)
    assert capacity.disk_bytes(ELECTRA, 2, 1) == pytest.approx(36 * 334e6, rel=0.01)
    assert capacity.disk_bytes(ELECTRA, 2, 1) < 20e9 < capacity.disk_bytes(ELECTRA, 2, 2)


def test_largest_micro_batch_by_hand():
    """100 GB free, 90 % of it used; 16 bytes a parameter, in half precision 2 more for those of layers."""
    fixed = 16 * capacity.count_parameters(ELECTRA)
    layers = 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    half, full = 24.5 * 1024 * 40 + 4 * 1024, 24.5 * 1024 * 80 + 4 * 1024
    assert capacity.largest_micro_batch(ELECTRA, 100 * 10**9, half=True) == int((90e9 - fixed - 2 * layers) / half)
    assert capacity.largest_micro_batch(ELECTRA, 100 * 10**9, half=False) == int((90e9 - fixed) / full)
    assert capacity.largest_micro_batch(ELECTRA, 10**9, half=True) == 0


def settings_of(folder: Path, **settings: object) -> tuple[Backbone, RunConfig]:
    """A backbone, and the settings of a run with it."""
    config = RunConfig(**{"backbone": str(folder), "max_length": 64, "mixed_precision": "no", **settings})
    backbone = load_backbone(config.backbone, 16)
    return backbone, config.with_recipe(backbone.recipe)


@pytest.mark.parametrize(
    ("free", "changed", "state", "advice"),
    [(10**12, {}, "ok", ""), (12 * 10**6, {}, "note", r"Set max_tokens_per_micro_step=\d+\."),
     (12 * 10**6, {"max_tokens_per_micro_step": 256}, "ok", ""),
     (2 * 10**6, {"max_length": 200}, "note", "Two full sides do not fit: set gradient_checkpointing=true"),
     (2 * 10**6, {"gradient_checkpointing": True, "max_tokens_per_micro_step": 64}, "ok", ""),
     (10**6, {}, "bad", "choose a smaller one")],
)  # fmt: skip
def test_memory(tiny, monkeypatch, free, changed, state, advice):
    """Enough for the setting; less, with the setting to choose; it was chosen; too little for any step."""
    backbone, config = settings_of(tiny, **changed)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: free)
    check = checks.check_memory(backbone, config, devices.make_accelerator("no"))
    assert check.state == state, check.finding
    assert re.search(advice, check.advice)


def test_disk(tiny, monkeypatch, tmp_path):
    """Asked of the folder above one that is not there yet; four models, two at a time, or one after the other."""
    asked, usage = [], namedtuple("usage", "free")
    backbone, config = settings_of(tiny, folds=(0, 1), num_seeds=2, num_processes=2, out=str(tmp_path / "runs" / "new"))
    one, two = (capacity.disk_bytes(backbone.config, 4, at_once) for at_once in (1, 2))
    for free, state, advice in ((two, "ok", ""), (one, "bad", "Set num_processes=1"), (one - 1, "bad", "Free some")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda place, free=free: asked.append(place) or usage(free))
        check = checks.check_disk(backbone, config)
        assert (check.state, check.advice.startswith(advice)) == (state, True)
    assert set(asked) == {tmp_path}
    (tmp_path / "runs" / "new" / "checkpoint").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "checkpoint" / "state.pt").write_bytes(b"x" * 5000)  # it will be replaced
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: usage(two - 5000))
    assert checks.check_disk(backbone, config).state == "ok"
    assert "models to save: 4, trained at the same time: 2" in check.finding


def test_unknown_scripts_are_named(backbone_folders):
    """A byte tokenizer knows everything; a small WordPiece one does not know Chinese."""
    bytes_check = checks.check_tokenizer(load_backbone(str(backbone_folders["roberta"]), 16))
    assert (bytes_check.state, "chinese 0%" in bytes_check.finding) == ("ok", True)
    pieces = checks.check_tokenizer(load_backbone(str(backbone_folders["electra"]), 16))
    assert (pieces.state, "thai" in pieces.advice, "latin" in pieces.advice) == ("note", True, False)


@pytest.mark.parametrize("settings", [{"mixed_precision": "fp16"}, {"max_length": 65}, {"init_from": "{tiny}"}])
def test_settings_that_a_run_would_refuse_are_bad(tiny, settings):
    """With the words of the run: no fp16 on a CPU, no side longer than positions, no encoder as a reward model."""
    settings = {name: str(tiny) if value == "{tiny}" else value for name, value in settings.items()}
    found = checks.examine(RunConfig(**{"backbone": str(tiny), "max_length": 32, **settings}))
    assert (found[-1].name, found[-1].state) == ("settings", "bad")
    assert next(iter(settings)) in found[-1].finding


def test_reward_model_is_examined(reward_folders):
    """`init_from` takes the place of the backbone."""
    folder = reward_folders["electra"]
    found = {check.name: check for check in checks.examine(RunConfig(init_from=str(folder), max_length=32))}
    assert found["backbone"].finding == str(folder)
    assert {found[name].state for name in ("backbone", "memory", "disk")} == {"ok"}


def test_inputs_on_kaggle_and_elsewhere(monkeypatch, tmp_path):
    """Without the competition nothing can be submitted there; elsewhere files are named by their paths."""
    assert checks.check_inputs().state == "ok"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    check = checks.check_inputs()
    assert (check.state, "Tried:" in check.finding) == ("bad", True)
    for name in ("train.csv", "test.csv"):
        path = tmp_path / "input" / "competitions" / kaggle.COMPETITION / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert (checks.check_inputs().state, checks.check_inputs().finding.count(".csv")) == ("ok", 2)


def test_doctor_as_a_command_and_a_table(tiny, tmp_path, capsys):
    """One line a check, exit code 0 and 1; nothing is written. In notebooks a table, the commit in it."""
    html = checks.first_look(RunConfig(backbone=str(tiny), max_length=32)).to_html()
    assert [name for name in ("python", "gpu", "memory", "disk", f"bundle, in {ROOT}") if name not in html] == []
    assert cli.main(["doctor", "--backbone", str(tiny), "--set", "max_length=32", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "usable"
    assert any(re.match(r"ok +backbone +", line) for line in lines)
    assert cli.main(["doctor", "--backbone", str(tmp_path / "nowhere")]) == 1
    assert re.search(r"^bad +settings .* was not found\. Tried:", capsys.readouterr().out, re.M)
    assert list(tmp_path.iterdir()) == []
