"""The cross-encoder: both answers in one sequence, both orders averaged, one of them a step of training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KINDS, read_tree, run_arguments
from torch import nn
from transformers import AutoTokenizer

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FeatureScaler, compute_features
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.tokenization import SideTokenizer, encode_rows
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.saved import build_model, load_fold_model, save_model
from prefcls_lib.pipeline.folder import RunFolder, read_table
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop
from prefcls_lib.training.step import train_step

SMALL = {"architecture": "cross", "batch_size": 16, "num_epochs": 2, "validations_per_epoch": 1, "dropout": 0.0,
         "learning_rate": 2e-3, "head_learning_rate": 2e-3, "layer_decay": 1.0, "schedule": "linear",
         "warmup_ratio": 0.1, "label_smoothing": 0.0, "head_only_rows": 0, "max_tokens_per_micro_step": 8192,
         "mixed_precision": "no"}  # fmt: skip


def make_model(folder, **settings):
    """A cross-encoder whose head has random weights."""
    seed_everything(1)
    model = build_model(folder, RunConfig(**{**SMALL, **settings})).eval()
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def encode(rows, folder) -> Examples:
    tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(folder))
    encoded = encode_rows(rows, tokenizer, 48, "none", "cross")
    features = FeatureScaler.fit(compute_features(rows)).transform(compute_features(rows)).astype(np.float32)
    return Examples(encoded.token_ids, encoded.sides, features, rows["label"].to_numpy())


@pytest.fixture(params=KINDS)
def folder(request, backbone_folders):
    return backbone_folders[request.param]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_swapping_the_answers_permutes_the_probabilities_exactly(folder, sample_rows, precision):
    """To the bit: the rows are swapped in the table and go all the way again."""
    rows = sample_rows.head(24)
    model, accelerator = make_model(folder), make_accelerator(precision)
    pad_id = model.encoder.config.pad_token_id
    swapped = rows.assign(response_a=rows["response_b"], response_b=rows["response_a"])
    probs, back = (predict_proba(model, encode(r, folder), accelerator, pad_id)[0] for r in (rows, swapped))
    assert (back == probs[:, [1, 0, 2]]).all()
    assert np.abs(probs[:, 0] - probs[:, 1]).max() > 0.01


def test_logits_are_the_mean_of_both_orders(tiny, sample_rows):
    """Written out: u of (A, B), v of (B, A); each order's own logits, the second's with A and B swapped back."""
    examples, model = encode(sample_rows.head(6), tiny), make_model(tiny)
    probs, _ = predict_proba(model, examples, make_accelerator("no"), 0)
    for row in range(6):
        logits = []
        for order, side in enumerate(examples.sides[row]):
            ids = torch.as_tensor(examples.token_ids[side], dtype=torch.long)[None]
            x = torch.as_tensor(examples.features[[row]]) * (model.head.signs if order else 1)
            with torch.inference_mode():
                hidden = model.encoder(input_ids=ids).last_hidden_state.mean(dim=1)
                fused = torch.cat([model.head.norm(hidden), x], dim=1)
                one = model.head.output(nn.functional.gelu(model.head.hidden(fused))) + model.head.wide(x)
            logits.append(one[0, [1, 0, 2]] if order else one[0])
        expected = torch.softmax((logits[0] + logits[1]) / 2, dim=0)
        np.testing.assert_allclose(probs[row], expected.numpy(), atol=1e-5)


def test_a_training_step_costs_one_sequence_a_pair(tiny, sample_rows):
    """Half the tokens of both orders, and the gradient is that of the one order, whatever the micro-batches."""
    examples = encode(sample_rows.head(16), tiny)
    drawn = examples.in_random_order(0, 0)
    found = []
    for max_tokens in (10**6, 100):
        model = make_model(tiny)
        config = RunConfig(**SMALL)
        _, tokens = train_step(
            model, drawn, np.arange(16), max_tokens, config, make_accelerator("no"), 0
        )  # fmt: skip
        assert tokens.real == drawn.lengths.sum() < 0.6 * examples.lengths.sum()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model = make_model(tiny)
    losses = []
    for row in range(16):
        ids = torch.as_tensor(drawn.token_ids[drawn.sides[row, 0]], dtype=torch.long)[None]
        u = model.encoder(input_ids=ids).last_hidden_state.mean(dim=1)
        logits = model.head(u, None, torch.as_tensor(drawn.features[[row]]))
        losses.append(nn.functional.cross_entropy(logits, torch.as_tensor(drawn.labels[[row]])))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        for gradient in found:
            torch.testing.assert_close(gradient[name], parameter.grad, atol=2e-6, rtol=1e-3)


def make_examples(num_rows: int, seed: int) -> Examples:
    """Sequences of two halves: the answer with token 50 wins, whichever comes first; with it in neither, a tie."""
    random = np.random.default_rng(seed)
    token_ids, labels = [], random.integers(0, 3, num_rows)
    for label in labels:
        a, b = (random.integers(100, 300, 9).astype(np.int32) for _ in range(2))
        for side, answer in enumerate((a, b)):
            if label == side:
                answer[1::2] = 50
        separator = np.array([2], dtype=np.int32)
        token_ids += [np.concatenate([a, separator, b]), np.concatenate([b, separator, a])]
    return Examples(token_ids, np.arange(2 * num_rows).reshape(-1, 2), None, labels)


def test_it_learns_which_answer_is_first(tiny):
    """The verdict can only be told by where in the sequence token 50 stands: to less than half the prior's loss."""
    config = RunConfig(**{**SMALL, "num_epochs": 10}, structure_features=False)
    seed_everything(1)
    model = build_model(tiny, config)
    model.head.start_at_prior((1 / 3, 1 / 3, 1 / 3))
    rows = make_examples(256, 1)
    result = loop.fit(model, rows, make_examples(60, 2), config, make_accelerator("no"), 0)
    assert result.history["valid_log_loss"].iloc[-1] < 0.5
    assert result.tokens.real == 10 * rows.lengths[:, 0].sum()


def test_saved_and_read_back(tiny, sample_rows, tmp_path):
    """The folder says that it is a cross-encoder: rows are encoded and predicted as before."""
    config = RunConfig(**SMALL, max_length=48)
    model = make_model(tiny)
    scaler = FeatureScaler.fit(compute_features(sample_rows.head(24)))
    save_model(tmp_path, model, load_backbone(str(tiny), 48), scaler, config)
    saved = load_fold_model(tmp_path)
    rows = sample_rows.head(24)
    again = saved.predict_proba(rows)
    probs, _ = predict_proba(model, encode(rows, tiny), make_accelerator("no"), 0)
    np.testing.assert_array_equal(again, probs)


def test_settings_that_contradict_it_stop_the_run():
    """A head that joins two answers, and a reward model that reads one, do not fit."""
    with pytest.raises(UserError, match=r"head='concat'.*cross-encoder"):
        RunConfig(architecture="cross", head="concat")
    with pytest.raises(UserError, match=r"init_from.*architecture=siamese"):
        RunConfig(architecture="cross", init_from="some/reward-model")


def test_whole_run(home, tmp_path):
    """Through the command line: the same files, exact under a swap, and `predict` gives the same submission again."""
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, "architecture=cross")) == 0
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["flip_rate"] == 0
    assert set(read_tree(out)) >= {"oof.csv", "valid.csv", "history.csv", "submission.csv", "model/fold0/fold.json"}
    again = tmp_path / "again.csv"
    test = str(home / "test.csv")
    assert cli.main(["predict", "--run", str(out), "--test", test, "--out", str(again)]) == 0
    columns = list(LABEL_COLUMNS)
    first, second = (read_table(path)[columns].to_numpy() for path in (out / "submission.csv", again))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_run_of_the_other_architecture_is_not_resumed(home, tmp_path, is_older):
    """A Siamese run's folder refuses the cross-encoder; a run older than the setting is a Siamese one, and resumes."""
    out = tmp_path / "run"
    config = RunConfig(backbone=str(home / "backbone"))
    RunFolder(out).open(config, {"train": "1", "test": "2"})
    if is_older:
        content = json.loads((out / "config.json").read_text(encoding="utf-8"))
        del content["settings"]["architecture"]
        (out / "config.json").write_text(json.dumps(content), encoding="utf-8")
    RunFolder(out).open(config, {"train": "1", "test": "2"})
    with pytest.raises(UserError, match="architecture='siamese', this one has architecture='cross'"):
        RunFolder(out).open(replace(config, architecture="cross"), {"train": "1", "test": "2"})
