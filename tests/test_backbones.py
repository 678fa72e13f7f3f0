"""Backbones beside the study's three: ModernBERT, MPNet, XLM-R, other DeBERTas; recipes, limits."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from conftest import KINDS, MORE_KINDS, SIZES
from test_model import predict
from test_train import LEARNS, fit, make_model
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PretrainedConfig

from prefcls_lib.config import RunConfig
from prefcls_lib.data.tokenization import clean_text
from prefcls_lib.doctor import capacity, checks
from prefcls_lib.models import backbones
from prefcls_lib.models.backbones import load_backbone, load_encoder, max_positions
from prefcls_lib.models.recipes import HUB_NAMES, choose_recipe
from prefcls_lib.models.saved import load_model, save_model
from prefcls_lib.runtime.files import UserError, read_json
from report.studies.t4_plan import T4_BYTES

CONFIGS = {path.stem: read_json(path)["config"] for path in Path(__file__).parents[1].glob("report/backbones/*.json")}
make_examples = partial(test_train.make_examples, longest=40)  # and sides beyond ModernBERT's local window


def read_config(name: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(**{**CONFIGS[name], **changes})


def make_config(folder: Path, max_length: int = 48) -> RunConfig:
    """Small and quick, the rest as in the backbone's recipe."""
    small = {"max_length": max_length, "batch_size": 16, "num_epochs": 3, "validations_per_epoch": 1,
             "mixed_precision": "no", "start_from": "none", **LEARNS}  # fmt: skip
    return RunConfig(**small).with_recipe(choose_recipe(AutoConfig.from_pretrained(folder)))


@pytest.mark.parametrize(
    ("kind", "layout", "markers"),
    [("modernbert", "[CLS][SEP][SEP]", (None,)), ("mdeberta-v2", "[CLS][SEP][SEP]", ("¶", "|", ";")),
     ("xlm-roberta", "<s></s></s></s>", ("¶", "|", ";")), ("mpnet", "<s></s></s></s>", ("¶", "|", ";"))],
)  # fmt: skip
def test_tokenizer_is_checked_and_its_layout_read(backbone_folders, kind, layout, markers):
    """ModernBERT keeps line breaks, the others have a marker for them; no text becomes a special token."""
    tokenizer = load_backbone(str(backbone_folders[kind]), 48).tokenizer
    ids = np.concatenate([tokenizer.prefix, tokenizer.between, tokenizer.suffix])
    assert tokenizer.decode(ids).replace(" ", "") == layout and tokenizer.newline_marker in markers
    (ids,) = tokenizer.encode_texts(["a <mask> [MASK] </s> [SEP] b"])
    assert tokenizer.special_ids.isdisjoint(ids.tolist())


def test_many_scripts_are_known_and_ascii_would_drop_them(backbone_folders):
    """Nothing is unknown to a vocabulary of many languages, much to an English one; "ascii" leaves nothing to read."""
    for kind in set(MORE_KINDS) - {"mpnet"}:
        check = checks.check_tokenizer(load_backbone(str(backbone_folders[kind]), 16))
        assert (check.state, check.finding.count(" 0%")) == ("ok", len(checks.SCRIPTS)), check.finding
    english = checks.check_tokenizer(load_backbone(str(backbone_folders["deberta-v2"]), 16))
    for script in ("greek", "chinese", "arabic", "thai"):
        assert script in english.advice
        assert not any(letter.isalpha() for letter in clean_text(checks.SCRIPTS[script], "ascii"))


@pytest.mark.parametrize("kind", ("bert", *MORE_KINDS))
def test_trains_saves_and_predicts_the_same(kind, backbone_folders, tmp_path):
    """Token 50 decides: learned on unseen rows, by every layer; what is read back gives the same probabilities."""
    config, valid = make_config(backbone_folders[kind]), make_examples(60, 2)
    model, backbone = make_model(backbone_folders[kind], config), load_backbone(str(backbone_folders[kind]), 48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit(model, config, train=make_examples(192, 1), valid=valid)
    assert result.history["valid_log_loss"].iloc[-1] < 0.5 and result.history["train_log_loss"].is_monotonic_decreasing
    assert result.tokens.useful_share > 0.7 and (result.history["tokens_per_second"] > 0).all()
    unmoved = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert not {name for name in unmoved if "position_ids" not in name}
    save_model(tmp_path, model, backbone, config)
    saved = load_model(tmp_path)
    np.testing.assert_array_equal(predict(saved.model, valid), predict(model, valid))
    texts = ["One, 二, three\nfour"]
    (one,), (again,) = (one.tokenizer.encode_texts(texts) for one in (backbone, saved.backbone))
    np.testing.assert_array_equal(again, one)


@pytest.mark.parametrize("kind", (*KINDS, *MORE_KINDS))
def test_checkpoint_of_a_masked_language_model_loads(kind, backbone_folders, tmp_path):
    """As the hub has most of them: the head for the masks is left out, nothing is missing, no pooler is made up."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folders[kind])
    whole = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(backbone_folders[kind]))
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(load_backbone(str(tmp_path), 16).path, 0.0)
    if kind == "modernbert":  # transformers 5.0 would compile it, and take FlashAttention-2, which a T4 cannot run
        assert encoder.config._attn_implementation == "sdpa"
        assert getattr(encoder.config, "reference_compile", False) is False
    expected = whole.base_model.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert not name.startswith("pooler")


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "electra", "bert", "mpnet", "modernbert"])
def test_too_many_tokens_are_refused_with_the_reason(kind, backbone_folders):
    """And with what to do; 64 are taken."""
    why = "it was pretrained on no more" if kind == "modernbert" else "it has no more positions"
    assert max_positions(load_backbone(str(backbone_folders[kind]), 64).config) == 64
    with pytest.raises(UserError, match=rf"max_length=65: .* 64 tokens, because {why}") as error:
        load_backbone(str(backbone_folders[kind]), 65)
    assert "Set max_length=64, or choose a DeBERTa or ModernBERT" in str(error.value)


@pytest.mark.parametrize("kind", ["deberta-v2", "mdeberta-v2"])
def test_deberta_reads_past_its_pretraining(kind, backbone_folders):
    """Its positions are relative: 768 tokens, where it says 64, and what stands far off still counts."""
    assert max_positions(load_backbone(str(backbone_folders[kind]), 768).config) is None
    encoder = load_encoder(backbone_folders[kind], 0.0).eval()
    ids = torch.as_tensor(np.random.default_rng(0).integers(100, 300, (1, 768))).repeat(2, 1)
    ids[1, -1] = 50
    with torch.inference_mode():
        first, changed = encoder(input_ids=ids).last_hidden_state[:, 0]
    assert torch.isfinite(first).all() and not torch.equal(first, changed)


def test_every_named_backbone_has_its_configuration():
    """Short names, and the configurations that plan and report are computed from."""
    assert {hub.split("/")[1].lower() for hub in HUB_NAMES.values()} == set(CONFIGS)
    kinds = [kind.split("_")[0] for kind in read_config("modernbert-base").layer_types[:4]]
    assert kinds == ["full", "sliding", "sliding", "full"]


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_complete_and_fits_a_t4(name):
    """Every value is allowed; its micro-batch fits without checkpointing, at 768 tokens where it takes them."""
    config, recipe = read_config(name), choose_recipe(read_config(name))
    settings = RunConfig(backbone=name).with_recipe(recipe)
    assert None not in [getattr(settings, key) for key in recipe]
    for length in (512, 768) if config.model_type in ("deberta-v2", "modernbert") else (512,):
        held = capacity.largest_micro_batch(config, T4_BYTES, True, length)
        assert held >= max(recipe["max_tokens_per_micro_step"], 2 * length)


def test_wider_encoders_have_their_own_recipes():
    """What is as wide, or of a width between, is trained alike."""
    recipes = {name: choose_recipe(read_config(name)) for name in CONFIGS}
    small, base = (recipes[f"deberta-v3-{size}"] for size in ("small", "base"))
    between = choose_recipe(read_config("deberta-v3-base", hidden_size=960))
    assert small == recipes["mdeberta-v3-base"] == base == between
    assert recipes["modernbert-base"] == recipes["ettin-encoder-150m"] != recipes["modernbert-large"]
    rates = [choose_recipe(AutoConfig.for_model("bert", hidden_size=w))["learning_rate"] for w in (384, 767, 768, 1024)]
    assert rates == [1e-4, 1e-4, 3e-5, 3e-5]


@pytest.mark.parametrize(
    ("name", "kind", "limit"),
    [("modernbert-large", "modernbert", 8192), ("ettin-encoder-150m", "modernbert", 7999),
     ("ettin-encoder-400m", "modernbert", 7999), ("deberta-v3-small", "deberta-v2", None)],
)  # fmt: skip
def test_shrunk_copies_of_the_published_configurations(name, kind, limit, backbone_folders, tmp_path):
    """As published but for the sizes: its tokenizer is taken, its limit known, and it predicts the same once saved."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folders[kind])
    ids = {key: None for key in CONFIGS[name] if key.endswith("_token_id")} | {"pad_token_id": tokenizer.pad_token_id}
    AutoModel.from_config(read_config(name, **SIZES, **ids, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), 768)
    assert max_positions(backbone.config) == limit
    config, examples = make_config(tmp_path, 768), make_examples(12, 0)
    model = make_model(tmp_path, config)
    save_model(tmp_path / "saved", model, backbone, config)
    np.testing.assert_array_equal(predict(load_model(tmp_path / "saved").model, examples), predict(model, examples))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("roberta_base", "Did you mean 'roberta-base'? "),
     ("microsoft/DeBERTa-v3-smal", "Did you mean 'deberta-v3-small'? "),
     ("ettin-encoder-300m", "Did you mean 'ettin-encoder-"), ("roberta-base", ""), ("zzz", "")],
)  # fmt: skip
def test_unknown_name_gets_the_nearest(name, hint, monkeypatch, tmp_path):
    """A mistyped name; one that is known but not at hand gets no hint, nor does one that is like no other."""
    monkeypatch.setattr(backbones, "_fetch", lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(UserError, match=f"pretrained model '{name}' was not found") as error:
        backbones.find_backbone(name)
    assert hint in str(error.value) and ("Did you mean" in str(error.value)) == bool(hint)
