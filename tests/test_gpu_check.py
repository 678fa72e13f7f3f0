"""`make gpu-check`: without a GPU it says so; its measurements run here on the CPU, at tiny sizes."""

import math

import pytest
import torch
from conftest import make_encoder

from prefcls_lib.runtime import devices
from prefcls_lib.runtime.files import read_json
from report.studies import gpu_check
from report.studies.t4_plan import flop_per_token

CONFIGS = {"tiny-deberta": make_encoder("deberta-v2", 200).config, "tiny-roberta": make_encoder("roberta", 200).config}


@pytest.fixture(scope="module")
def record():
    """Of two tiny encoders with sides of 32 tokens, in fp32 and bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "PAIRS", 4)
        return gpu_check.check_device(CONFIGS, ["no", "bf16"], 32, 64)


@pytest.fixture
def job(monkeypatch):
    """A training of the tiny RoBERTa."""
    monkeypatch.setattr(gpu_check, "PAIRS", 4)
    return gpu_check.Job(CONFIGS["tiny-roberta"], 32, devices.make_accelerator("no"))


def test_without_a_gpu_it_says_so(capsys, tmp_path, monkeypatch):
    """Exit code 2, and nothing is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "has no GPU" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_every_line_is_measured(record):
    """A pace, a share of the matrix peak; what only a GPU has is left open; a resumed training has the same bits."""
    names = [(line["backbone"], line["precision"]) for line in record["lines"]]
    assert names == [(name, precision) for precision in ("no", "bf16") for name in CONFIGS]
    for line in record["lines"]:
        assert line["verdict"] == "ok" and line["finite"] and line["padded_batches_per_step"] >= 1
        assert (line["peak_gib"], line["waits_per_step"], line["skipped_steps"]) == (None, None, 0)
        assert (line["precision_error"] == 0) == (line["precision"] == "no")
        flop = flop_per_token(CONFIGS[line["backbone"]], 32)
        share = 3 * flop * line["train_tokens_per_second"] / line["matrix_peak"]
        assert share > 0 and math.isclose(line["train_peak_share"], share)
    assert record["resume"] == {"difference": 0.0, "verdict": "ok"}


def test_resume_that_loses_the_optimizer_is_found(job, monkeypatch):
    """With new moments in place of the saved ones the next step is another one."""
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    assert gpu_check.check_resume(job)["verdict"] == "weights differ"


def test_waits_are_counted(job, monkeypatch):
    """By the names that the profiler gives: here of an operation of a CPU, the more the more steps there are."""
    monkeypatch.setattr(gpu_check, "WAITS", ("aten::addmm",))
    (few, passes), (many, more) = (gpu_check.count_waits(job, steps) for steps in (1, 2))
    assert 0 < few < many and 0 < passes < more


@pytest.mark.parametrize(
    ("backbone", "change", "verdict"),
    [("roberta", {"finite": False, "skipped_steps": 4, "precision_error": math.nan},
      "loss or gradient is not finite; too many steps skipped; 16 bits differ too much from fp32"),
     ("roberta", {"peak_gib": 5.4, "planned_gib": 5.0}, "ok"),
     ("roberta", {"waits_per_step": 7, "peak_gib": 5.6, "planned_gib": 5.0},
      "more memory than planned; too many waits"),
     ("deberta", {"waits_per_step": 8, "padded_batches_per_step": 2}, "ok"),
     ("deberta", {"waits_per_step": 9, "padded_batches_per_step": 2}, "too many waits")],
)  # fmt: skip
def test_verdict(record, backbone, change, verdict):
    """Each fault by its name; a tenth more memory than planned is allowed, and DeBERTa's own waits, one a batch."""
    assert gpu_check.judge(record["lines"][1] | change, CONFIGS[f"tiny-{backbone}"]) == verdict


def test_record_is_written_as_json_and_table(record, monkeypatch, tmp_path, capsys):
    """With a GPU (pretended): both files, a verdict a line, exit code 0; 1 where a line is not ok."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    asked = []
    monkeypatch.setattr(gpu_check, "check_device", lambda *arguments: asked.append(arguments) or record)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    ((configs, precisions, length, _),) = asked
    assert (list(configs), precisions, length) == (list(gpu_check.NAMES), ["fp16"], 512)
    assert configs["roberta-base"].hidden_dropout_prob == 0
    assert read_json(tmp_path / "gpu_check.json") == record
    text = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    title = (gpu_check.FOLDER / "gpu_check.md").read_text(encoding="utf-8").splitlines()[0]  # the report leaves it out
    assert text.splitlines()[0] == title == "# GPU check" and text.count("| ok |") == 4
    assert "After a resume, weights differ by 0.0e+00 of what training changed: ok." in text
    assert text in capsys.readouterr().out
    monkeypatch.setitem(record["lines"][0], "verdict", "too many waits")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
