"""Backbones beside the study's three: ModernBERT, MPNet, XLM-R, other DeBERTas; recipes, limits."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from conftest import KINDS, MORE_KINDS, run_arguments
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PretrainedConfig

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import make_padded_batches
from prefcls_lib.data.tokenization import clean_text
from prefcls_lib.doctor import capacity, checks
from prefcls_lib.models import backbones
from prefcls_lib.models.backbones import load_backbone, load_encoder, set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import HUB_NAMES, choose_recipe
from prefcls_lib.models.saved import build_model, load_fold_model, save_model
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import UserError, read_json
from prefcls_lib.training import loop, optim

CONFIGS = {path.stem: read_json(path)["config"] for path in Path(__file__).parents[1].glob("report/backbones/*.json")}
T4 = capacity.T4_BYTES
make_examples = partial(test_train.make_examples, longest=40)  # and sides beyond ModernBERT's local window


@pytest.fixture(scope="session")
def folders(backbone_folders, more_backbone_folders) -> dict[str, Path]:
    return {**backbone_folders, **more_backbone_folders}


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_runs_through_the_command_line(kind, folders, home, tmp_path):
    """From rows to a checked submission."""
    arguments = run_arguments(home, tmp_path / "run", f"backbone={folders[kind]}", "folds=[0]")
    assert cli.main(arguments) == 0
    assert read_json(tmp_path / "run" / "result.json")["backbone"] == str(folders[kind])
    assert (
        cli.main(["check-submission", str(tmp_path / "run" / "submission.csv"), "--test", str(home / "test.csv")]) == 0
    )


@pytest.fixture(params=MORE_KINDS)
def folder(request, folders) -> Path:
    return folders[request.param]


def read_config(name: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(**{**CONFIGS[name], **changes})


def make_config(folder: Path, **settings: object) -> RunConfig:
    """Small and quick, the rest as in the backbone's recipe."""
    small = {"max_length": 48, "batch_size": 16, "num_epochs": 3, "validations_per_epoch": 1, "mixed_precision": "no",
             "structure_features": False, "start_from": "none", "label_smoothing": 0.0,
             "learning_rate": 2e-3, "head_learning_rate": 2e-3}  # fmt: skip
    return RunConfig(**{**small, **settings}).with_recipe(choose_recipe(AutoConfig.from_pretrained(folder)))


def make_model(folder: Path, config: RunConfig) -> PreferenceModel:
    seed_everything(1)
    model = build_model(folder, config)
    model.head.start_at_prior((0.3, 0.3, 0.4))
    return model


def pad_id_of(model: PreferenceModel) -> int:
    return model.encoder.config.pad_token_id


def test_tokenizer_is_checked_and_its_layout_read(folders):
    """ModernBERT keeps line breaks and has BERT's special tokens; XLM-R and MPNet have RoBERTa's, and drop them."""
    modern = load_backbone(str(folders["modernbert"]), 48).tokenizer
    assert modern.decode(np.concatenate([modern.prefix, modern.between, modern.suffix])) == "[CLS][SEP][SEP]"
    assert modern.newline_marker is None
    for kind, text in (
        ("xlm-roberta", "<s></s></s></s>"),
        ("mpnet", "<s></s></s></s>"),
        ("mdeberta-v2", "[CLS][SEP][SEP]"),
    ):
        tokenizer = load_backbone(str(folders[kind]), 48).tokenizer
        ids = np.concatenate([tokenizer.prefix, tokenizer.between, tokenizer.suffix])
        assert tokenizer.decode(ids).replace(" ", "") == text
        assert tokenizer.newline_marker in ("¶", "|", ";")
        (ids,) = tokenizer.encode_texts(["a <mask> [MASK] </s> [SEP] b"])
        assert tokenizer.special_ids.isdisjoint(ids.tolist())


def test_many_scripts_are_known_and_ascii_would_drop_them(folders):
    """Nothing is unknown to a vocabulary of many languages, much to an English one; "ascii" leaves nothing to read."""
    for kind in set(MORE_KINDS) - {"mpnet"}:
        check = checks.check_tokenizer(load_backbone(str(folders[kind]), 16))
        assert (check.state, check.finding.count(" 0%")) == ("ok", len(checks.SCRIPTS)), check.finding
    english = checks.check_tokenizer(load_backbone(str(folders["deberta-v2"]), 16))
    for script in ("greek", "chinese", "arabic", "thai"):
        assert script in english.advice
        assert not any(letter.isalpha() for letter in clean_text(checks.SCRIPTS[script], "ascii"))


def test_padding_changes_no_embedding(folder):
    """One side at a time, unpadded, and padded to 60, beyond ModernBERT's local window: the same in fp32."""
    model = make_model(folder, make_config(folder)).eval()
    examples = make_examples(12, 0)
    with torch.inference_mode():
        alone = model.embed_sides(make_padded_batches(examples.token_ids, pad_id_of(model), max_sides=1))
        padded = model.embed_sides(make_padded_batches(examples.token_ids, pad_id_of(model), 5, 10**6, multiple_of=60))
    assert alone.std(dim=0).mean() > 0.01
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_padding_beyond_a_local_window_is_harmless_in_half_precision(folder, precision):
    """A padded place of ModernBERT's local layers may see padding alone: nothing of it may reach a real token."""
    model = make_model(folder, make_config(folder)).eval()
    sides = [np.arange(100, 100 + length, dtype=np.int32) for length in (4, 5, 60)]
    padded = make_padded_batches(sides, pad_id_of(model), 5, 10**6, multiple_of=60)
    with torch.autocast("cpu", dtype=precision):
        embedded = model.embed_sides(padded)
    embedded.sum().backward()
    exact = model.embed_sides(make_padded_batches(sides, pad_id_of(model), max_sides=1))
    torch.testing.assert_close(embedded, exact, atol=0.1, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters() if p.grad is not None)


def test_trains_saves_and_predicts_the_same(folder, tmp_path):
    """Token 50 decides: learned on unseen rows, by every layer; what is read back gives the same probabilities."""
    config = make_config(folder)
    model, valid = make_model(folder, config), make_examples(60, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = loop.fit(model, make_examples(192, 1), valid, config, make_accelerator("no"), pad_id_of(model))
    assert result.history["valid_log_loss"].iloc[-1] < 0.5
    unmoved = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert [name for name in unmoved if "position_ids" not in name and "signs" not in name] == []
    save_model(tmp_path, model, load_backbone(str(folder), 48), None, config)
    saved = load_fold_model(tmp_path)
    probs, _ = predict_proba(model.eval(), valid, make_accelerator("no"), pad_id_of(model))
    again, _ = predict_proba(saved.model.eval(), valid, make_accelerator("no"), saved.backbone.tokenizer.pad_id)
    np.testing.assert_array_equal(again, probs)
    text = ["One, 二, три\nfour"]
    np.testing.assert_array_equal(
        saved.backbone.tokenizer.encode_texts(text)[0], load_backbone(str(folder), 48).tokenizer.encode_texts(text)[0]
    )


def test_gradient_checkpointing_changes_no_gradient(folder):
    """After one epoch the weights are those of a run without it; MPNet cannot do it, and says so."""
    weights = []
    if "mpnet" in folder.name:
        with pytest.raises(UserError, match="gradient_checkpointing=true: not possible with 'mpnet'"):
            set_gradient_checkpointing(load_encoder(folder, 0.0), True)
        return
    for checkpointing in (False, True):
        config = make_config(folder, num_epochs=1, learning_rate=1e-3, gradient_checkpointing=checkpointing)
        model = make_model(folder, config)
        loop.fit(
            model,
            make_examples(32, 1),
            make_examples(9, 2),
            config,
            make_accelerator("no"),
            pad_id_of(model),
        )
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_layer_decay_by_hand(folder):
    """Two layers, decay .5: top layer 1, first .5, embeddings .25; ModernBERT's norm above the layers 1."""
    config = make_config(folder, learning_rate=0.008, layer_decay=0.5)
    model = make_model(folder, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["peak"] for group in optim.parameter_groups(model, config) for p in group["params"]}
    assert set(rates) == set(names.values())
    for name, rate in rates.items():
        if name.startswith("encoder."):
            place = "top" if ".1." in name or "final_norm" in name else "first" if ".0." in name else "below"
            assert rate == {"top": 0.008, "first": 0.004, "below": 0.002}[place], name
    assert set(rates.values()) == {0.008, 0.004, 0.002}


def test_dropout_is_a_setting(folder):
    """It reaches every dropout of the encoder, under whatever name its configuration has, and 0 is exact."""
    (ids,) = make_examples(1, 0).token_ids[:1]
    for dropout in (0.0, 0.5):
        encoder = load_encoder(folder, dropout)
        assert encoder.training
        found = Counter(module.p for module in encoder.modules() if isinstance(module, nn.Dropout))
        assert set(found) == {dropout}
        attention = [m.attention_dropout for m in encoder.modules() if hasattr(m, "attention_dropout")]
        assert set(attention) <= {dropout}
        once, twice = (encoder(input_ids=torch.as_tensor(ids[None].astype(np.int64)))[0] for _ in range(2))
        assert torch.equal(once, twice) == (dropout == 0)


def test_modernbert_is_neither_compiled_nor_on_another_attention(folders):
    """Transformers 5.0 would compile it on any GPU, and take FlashAttention-2, which a T4 cannot run."""
    config = load_encoder(folders["modernbert"], 0.0).config
    assert config._attn_implementation == "sdpa"
    assert getattr(config, "reference_compile", False) is False


@pytest.mark.parametrize("kind", (*KINDS, *MORE_KINDS))
def test_checkpoint_of_a_masked_language_model_loads(kind, folders, tmp_path):
    """As the hub has most of them: the head for the masks is left out, nothing is missing, no pooler is made up."""
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    whole = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folders[kind]))
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(load_backbone(str(tmp_path), 16).path, 0.0)
    expected = whole.base_model.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert not name.startswith("pooler")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("roberta", "the positions of roberta are absolute"),
        ("xlm-roberta", "the positions of xlm-roberta are absolute"),
        ("electra", "the positions of electra are absolute"),
        ("bert", "the positions of bert are absolute"),
        ("mpnet", "the positions of mpnet are absolute"),
        ("modernbert", "the positions of modernbert are pretrained no further"),
    ],
)
def test_too_many_tokens_are_refused_with_the_reason(kind, why, folders):
    """And with what to do; 64 are taken."""
    assert load_backbone(str(folders[kind]), 64).max_length == 64
    with pytest.raises(UserError, match=rf"max_length=65: .* at most 64 tokens, for {why}") as error:
        load_backbone(str(folders[kind]), 65)
    assert "Set max_length=64, or take a DeBERTa or ModernBERT" in str(error.value)


@pytest.mark.parametrize("kind", ["deberta-v2", "mdeberta-v2"])
def test_deberta_reads_past_its_pretraining(kind, folders):
    """Its positions are relative: 768 tokens, where it says 64, and what stands far off still counts."""
    assert load_backbone(str(folders[kind]), 768).max_length is None
    encoder = load_encoder(folders[kind], 0.0).eval()
    ids = torch.as_tensor(np.random.default_rng(0).integers(100, 300, (1, 768)))
    other = ids.clone()
    other[0, -1] = 50
    with torch.inference_mode():
        first, changed = (encoder(input_ids=x).last_hidden_state[0, 0] for x in (ids, other))
    assert torch.isfinite(first).all()
    assert not torch.equal(first, changed)


def test_every_named_backbone_has_its_configuration():
    """Short names, and the configurations that plan and report are computed from."""
    assert {hub.split("/")[1].lower() for hub in HUB_NAMES.values()} == set(CONFIGS)
    assert read_config("modernbert-base").layer_types[:4] == [
        "full_attention",
        *["sliding_attention"] * 2,
        "full_attention",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_complete_and_fits_a_t4(name):
    """Every value is allowed; its micro-batch fits without checkpointing, at 768 tokens where it takes them."""
    config, recipe = read_config(name), choose_recipe(read_config(name))
    settings = RunConfig(backbone=name).with_recipe(recipe)
    assert None not in [getattr(settings, key) for key in recipe]
    for length in (512, 768) if config.model_type in ("deberta-v2", "modernbert") else (512,):
        held = capacity.largest_micro_batch(config, T4, True, length)
        assert held >= max(recipe["max_tokens_per_micro_step"], 2 * length)


def test_wider_encoders_have_their_own_recipes():
    """Base takes half of xsmall's rate, large also decays by layer; whatever is as wide, or of a width between, is
    trained alike. The large ModernBERTs take a lower rate than the base ones, and BERT-base than MiniLM."""
    xsmall, small, base, large, many = (
        choose_recipe(read_config(name))
        for name in ("deberta-v3-xsmall", "deberta-v3-small", "deberta-v3-base", "deberta-v3-large", "mdeberta-v3-base")
    )
    assert base["learning_rate"] == xsmall["learning_rate"] / 2
    assert (base["layer_decay"], large["layer_decay"]) == (1.0, 0.9)
    assert small == many == base == choose_recipe(read_config("deberta-v3-base", hidden_size=960))
    assert large["warmup_ratio"] == 0.1
    modern = {name: choose_recipe(read_config(name)) for name in CONFIGS if "modern" in name or "ettin" in name}
    assert modern["modernbert-base"] == modern["ettin-encoder-150m"]
    assert modern["modernbert-large"] == modern["ettin-encoder-400m"]
    assert modern["modernbert-large"]["learning_rate"] < modern["modernbert-base"]["learning_rate"]
    rates = [choose_recipe(AutoConfig.for_model("bert", hidden_size=w))["learning_rate"] for w in (384, 767, 768, 1024)]
    assert rates == [1e-4, 1e-4, 3e-5, 3e-5]


@pytest.mark.parametrize(
    ("name", "kind", "limit"),
    [("modernbert-large", "modernbert", 8192), ("ettin-encoder-150m", "modernbert", 7999),
     ("ettin-encoder-400m", "modernbert", 7999), ("deberta-v3-small", "deberta-v2", None)],
)  # fmt: skip
def test_shrunk_copies_of_the_published_configurations(name, kind, limit, folders, tmp_path):
    """As published but for the sizes: its tokenizer is taken, its limit known, and it predicts the same once saved."""
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {key: None for key in CONFIGS[name] if key.endswith("_token_id")} | {"pad_token_id": tokenizer.pad_token_id}
    AutoModel.from_config(read_config(name, **sizes, **ids, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), 768)
    assert backbone.max_length == limit
    config, examples = make_config(tmp_path, max_length=768), make_examples(12, 0)
    model = make_model(tmp_path, config)
    (saved := tmp_path / "saved").mkdir()
    save_model(saved, model, backbone, None, config)
    first, again = (
        predict_proba(one, examples, make_accelerator("no"), tokenizer.pad_token_id)[0]
        for one in (model, load_fold_model(saved).model)
    )
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("roberta_base", "Did you mean 'roberta-base'? "),
     ("microsoft/DeBERTa-v3-smal", "Did you mean 'deberta-v3-small'? "),
     ("ettin-encoder-300m", "Did you mean 'ettin-encoder-"), ("roberta-base", ""), ("zzz", "")],
)  # fmt: skip
def test_unknown_name_gets_the_nearest(name, hint, monkeypatch, tmp_path):
    """A mistyped name; one that is known but not at hand gets no hint, nor does one that is like no other."""
    monkeypatch.setattr(backbones, "_fetch", lambda *_: (_ for _ in ()).throw(OSError()))
    with pytest.raises(UserError, match=f"backbone '{name}' was not found") as error:
        backbones.find_backbone(name)
    assert ("Did you mean" in str(error.value)) == bool(hint)
    assert hint in str(error.value)


def test_doctor_refuses_a_length_that_the_backbone_cannot_take(folders):
    """The same message as a run's."""
    (*_, last) = checks.examine(RunConfig(backbone=str(folders["xlm-roberta"]), max_length=65))
    assert (last.name, last.state) == ("settings", "bad")
    assert "absolute" in last.finding
