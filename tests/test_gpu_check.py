"""`make gpu-check`: without a GPU it says so; its measurements run here on the CPU, at tiny sizes."""

import math

import pytest
import torch
from conftest import make_deberta, make_roberta

from prefcls_lib.runtime import devices
from prefcls_lib.runtime.files import read_json
from report.studies import gpu_check

CONFIGS = {"tiny-deberta": make_deberta(200).config, "tiny-roberta": make_roberta(200).config}


@pytest.fixture(scope="module")
def record():
    """Of two tiny encoders with sides of 32 tokens, in fp32 and bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "PAIRS", 4)
        return gpu_check.check_device(CONFIGS, ["no", "bf16"], 32, 64)


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    """Exit code 2, and nothing is written."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "has no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_line_is_measured(record):
    """Finite losses and gradients, a pace, a share of the matrix peak; what only a GPU has is left open."""
    assert [(line["backbone"], line["precision"]) for line in record["lines"]] == [
        (name, precision) for precision in ("no", "bf16") for name in CONFIGS
    ]
    for line in record["lines"]:
        assert line["verdict"] == "ok"
        assert line["loss"] > 0 and line["gradient_norm"] > 0 and line["train_tokens_per_second"] > 0
        assert (line["peak_gib"], line["waits_per_step"], line["skipped_steps"]) == (None, None, 0)
        assert (line["precision_error"] == 0) == (line["precision"] == "no")
        flop = gpu_check.capacity.flop_per_token(CONFIGS[line["backbone"]], 32)
        share = 3 * flop * line["train_tokens_per_second"] / line["matrix_peak"]
        assert math.isclose(line["train_peak_share"], share)


def test_resume_and_attention_are_measured(record):
    """On a CPU a resumed step has the same bits; only DeBERTa has two kinds of attention."""
    assert record["resume"] == {"resumed_at_step": 1, "difference": 0.0, "verdict": "ok"}
    assert [line["backbone"] for line in record["attention"]] == ["tiny-deberta"] * 2
    assert all(line["fused_tokens_per_second"] > 0 for line in record["attention"])


def test_resume_that_loses_the_optimizer_is_found(monkeypatch):
    """With new moments in place of the saved ones the next step is another one."""
    monkeypatch.setattr(gpu_check, "PAIRS", 4)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    found = gpu_check.check_resume(CONFIGS["tiny-roberta"], 32, devices.make_accelerator("no"))
    assert found["verdict"] == "the weights differ"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"loss": None}, "loss or gradient is not finite"),
        ({"skipped_steps": 4}, "too many steps skipped"),
        ({"precision_error": math.nan}, "16 bits differ too much from fp32"),
        ({"max_tokens": 4096}, "the recipe's micro-batch does not fit"),
        ({"peak_gib": 5.6, "planned_gib": 5.0}, "more memory than planned"),
        ({"peak_gib": 5.4, "planned_gib": 5.0}, "ok"),
        ({"waits_per_step": 7, "peak_gib": 9.0}, "more memory than planned; too many waits"),
    ],
)
def test_verdict(record, change, verdict):
    """Each fault by its name, alone and together; a tenth more memory than planned is allowed."""
    line = {**record["lines"][1], **change}
    assert gpu_check.judge(line, CONFIGS["tiny-roberta"]) == verdict


def test_debertas_own_waits_are_allowed(record):
    """One in each padded batch, which transformers makes; one more than that and those of a step is too many."""
    line = record["lines"][0]
    assert line["padded_batches_per_step"] >= 1
    allowed = gpu_check.MOST_WAITS + line["padded_batches_per_step"]
    for waits, verdict in ((allowed, "ok"), (allowed + 1, "too many waits")):
        assert gpu_check.judge({**line, "waits_per_step": waits}, CONFIGS["tiny-deberta"]) == verdict


def test_waits_are_counted(monkeypatch):
    """By the names that the profiler gives: here of an operation that a CPU has, three times."""
    monkeypatch.setattr(gpu_check, "WAITS", ("aten::item",))
    assert gpu_check.count_waits(lambda: [torch.ones(1).item() for _ in range(3)]) == 3


def test_record_is_written_as_json_and_table(record, monkeypatch, tmp_path, capsys):
    """With a GPU (pretended): both files, a verdict a line, exit code 0; 1 where a line is not ok."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    asked = []
    monkeypatch.setattr(gpu_check, "check_device", lambda *arguments: asked.append(arguments) or record)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    ((configs, precisions, length, _),) = asked
    assert (list(configs), precisions, length) == (list(gpu_check.NAMES), ["fp16"], 512)
    assert read_json(tmp_path / "gpu_check.json") == record
    text = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    title = (gpu_check.FOLDER / "gpu_check.md").read_text(encoding="utf-8").splitlines()[0]  # the report leaves it out
    assert text.splitlines()[0] == title == "# GPU check"
    assert text.count("| ok |") == 4
    assert "Resumed at step 1; a step later weights differ by 0.0e+00 of the largest: ok." in text
    assert text in capsys.readouterr().out
    monkeypatch.setitem(record["lines"][0], "verdict", "too many waits")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
