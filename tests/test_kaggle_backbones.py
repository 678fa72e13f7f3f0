"""Backbones in the forms that the hub has them: from the downloaded folder to what Kaggle gets, and to a submission."""

import json
import sys
from pathlib import Path

import backbone
import pytest
import sentencepiece
import torch
from conftest import SIZES, make_encoder, make_tokenizer, run_arguments
from safetensors.torch import load_file
from transformers import AutoTokenizer

from prefcls_lib import cli
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.submission import check_submission
from prefcls_lib.models.backbones import load_backbone, load_encoder
from prefcls_lib.runtime.files import UserError

KINDS = ("deberta-v3", "electra", "roberta")


def write_deberta(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    """As microsoft/deberta-v3-*: spm.model and no tokenizer.json, fp16 weights with the layers of pretraining."""
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    special = {f"{name}_id": number for number, name in enumerate(pieces)}
    special |= {f"{name}_piece": piece for name, piece in pieces.items()}
    sentences = (text.replace("\n", " ") for text in texts)
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=sentences, model_prefix=str(folder / "spm"), vocab_size=500, minloglevel=2, **special)
    (folder / "spm.vocab").unlink()
    model = make_encoder("deberta-v2", 512).half()
    config = model.config.to_dict()
    del config["transformers_version"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    state = {f"deberta.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, "lm_predictions.lm_head.bias": torch.zeros(512).half()}, folder / "pytorch_model.bin")
    return model.state_dict()


def write_electra(folder: Path, tokenizer: Path) -> dict[str, torch.Tensor]:
    """As google/electra-*: weights of the year 2020, with a buffer that is a buffer no more."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    model = make_encoder("electra", len(AutoTokenizer.from_pretrained(tokenizer)))
    model.config.save_pretrained(folder)
    state = {f"electra.{name}": tensor for name, tensor in model.state_dict().items()}
    state["electra.embeddings.position_ids"] = torch.arange(64)[None]
    state["discriminator_predictions.dense.weight"] = torch.zeros(SIZES["hidden_size"], SIZES["hidden_size"])
    torch.save(state, folder / "pytorch_model.bin")
    return model.state_dict()


def write_roberta(folder: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    """As an older RoBERTa: vocab.json and merges.txt alone."""
    tokenizer = make_tokenizer("roberta", texts)
    model = make_encoder("roberta", len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    return model.state_dict()


@pytest.fixture
def source(tmp_path, request, sample_rows, backbone_folders) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of one of KINDS, and its weights."""
    folder, texts = tmp_path / "source", [turn[:1000] for turns in sample_rows["response_a"] for turn in turns]
    folder.mkdir()
    torch.manual_seed(0)
    if request.param == "electra":
        return folder, write_electra(folder, backbone_folders["electra"])
    return folder, (write_deberta if request.param == "deberta-v3" else write_roberta)(folder, texts)


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_from_the_hubs_form_to_a_submission(source, tmp_path, home):
    """Equal weights, fp16 where they were; a tokenizer.json that gives the same ids; and a run that starts from it."""
    folder, weights = source
    prepared = tmp_path / "prepared"
    backbone.prepare_backbone("mine", folder, prepared)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in prepared.iterdir()}
    assert not [path for path in prepared.iterdir() if path.suffix in (".bin", ".model")]
    stored = {tensor.dtype for name, tensor in load_file(prepared / "model.safetensors").items() if "ids" not in name}
    assert stored == {next(iter(weights.values())).dtype}
    encoder = load_encoder(prepared, dropout=0.0).state_dict()
    assert set(encoder) == set(weights)
    assert all(encoder[name].dtype == torch.float32 and torch.equal(encoder[name], weights[name].float())
               for name in weights)  # fmt: skip
    one, other = (AutoTokenizer.from_pretrained(place) for place in (folder, prepared))
    ids, again = (t("Where is it, then? " * 20, truncation=False, padding=False)["input_ids"] for t in (one, other))
    assert ids == again and len(ids) > 60
    assert (ids[0], ids[-1]) == (one.cls_token_id, one.sep_token_id)
    limits = json.loads((prepared / "tokenizer.json").read_text())
    assert limits["truncation"] is limits["padding"] is None  # ELECTRA's has both
    assert json.loads((prepared / "config.json").read_text())["transformers_version"]
    assert cli.main(run_arguments(home, tmp_path / "run", f"backbone={prepared}")) == 0
    ids = list(read_rows(home / "test.csv", labelled=False)["id"])
    check_submission(tmp_path / "run" / "submission.csv", ids)


@pytest.mark.parametrize("source", ["deberta-v3"], indirect=True)
def test_without_sentencepiece_the_package_is_named(source, monkeypatch):
    """transformers itself asks for tiktoken."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"for spm\.model, the packages sentencepiece and protobuf"):
        load_backbone(str(source[0]), 16)
