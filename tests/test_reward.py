"""Starting from a reward model: read, scored and ranked as its own sequence-classification model does."""

import shutil

import numpy as np
import pytest
import torch
from conftest import KINDS, run_arguments
from test_model import encode, predict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.saved import build_model, load_model, save_model
from prefcls_lib.pipeline import folds
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.training.optim import make_optimizer


@pytest.fixture(params=KINDS)
def folder(request, reward_folders):
    return reward_folders[request.param]


def own_scores(folder, examples: Examples) -> np.ndarray:
    """(N, 2) the scores of both answers, one at a time by transformers itself, with the token types of pretraining."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    sep_id = AutoTokenizer.from_pretrained(folder).sep_token_id
    has_types = folder.name in ("reward-bert", "reward-electra")
    scores = []
    with torch.inference_mode():
        for ids in examples.token_ids:
            types = np.concatenate([[0], np.cumsum(ids == sep_id)[:-1] % 2])  # changes after each separator
            more = {"token_type_ids": torch.as_tensor(types)[None]} if has_types else {}
            scores.append(float(model(torch.as_tensor(ids, dtype=torch.long)[None], **more).logits))
    return np.array(scores)[examples.sides]


def start(folder, examples: Examples, **settings):
    """The untrained model with its temperature fitted on `examples`."""
    config = RunConfig(init_from=str(folder), mixed_precision="no", **settings)
    model = build_model(folder, config)
    model.head.start_at_prior((0.4, 0.4, 0.2))
    folds.start_at_scores(model, examples, make_accelerator("no"))
    return model, config


@pytest.mark.parametrize("head", ["symmetric", "concat"])
def test_untrained_model_ranks_exactly_as_the_reward_model(folder, sample_rows, head):
    """log P(A) - log P(B) is the difference of the scores divided by one temperature, for every row."""
    examples = encode(sample_rows.head(40), folder)
    model, _ = start(folder, examples, head=head)
    probs, scores = predict(model, examples), own_scores(folder, examples)
    margins, log_odds = scores[:, 0] - scores[:, 1], np.log(probs[:, 0] / probs[:, 1])
    assert margins.std() > 0.05
    temperature = margins @ margins / (margins @ log_odds)
    assert 0 < temperature < np.inf
    np.testing.assert_allclose(log_odds * temperature, margins, atol=1e-4)
    assert np.diff(log_odds[np.argsort(margins)]).min() > -1e-5  # rows from the surest B to the surest A


def test_temperature_is_the_one_that_suits_the_training_rows(reward_folders, sample_rows):
    """Neither a hotter nor a colder one has a lower log loss on the rows that it was fitted on."""
    folder = reward_folders["deberta-v2"]
    examples = encode(sample_rows.head(100), folder)
    scores = own_scores(folder, examples)
    labels = np.where(scores[:, 0] > scores[:, 1], 0, 1)  # the reward model is right in 90 of 100 rows
    labels[::10] = 1 - labels[::10]
    labels[5::10] = 2
    examples = Examples(examples.token_ids, examples.sides, labels)
    model, _ = start(folder, examples)

    fitted, losses = model.head.skip.weight.detach().clone(), []
    for factor in (1.0, 0.8, 1.25):
        model.head.skip.weight.data = fitted * factor
        losses.append(-np.log(predict(model, examples)[np.arange(100), labels]).mean())
    assert losses[0] < min(losses[1:]) < max(losses[1:]) < np.log(3)


def test_every_pretrained_weight_learns_at_the_encoders_rate(folder, sample_rows):
    """Pooler and skip come with the encoder: its top layer's rate, not the new head's."""
    model, _ = start(folder, encode(sample_rows.head(40), folder))
    config = RunConfig(learning_rate=1e-5, head_learning_rate=1e-3, layer_decay=0.5)
    groups = make_optimizer(model, config, torch.device("cpu")).param_groups
    rate_of = {id(p): group["peak"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith(("pooler.", "head.skip.")):
            assert rate_of[id(parameter)] == 1e-5
        elif name.startswith("head."):
            assert rate_of[id(parameter)] == 1e-3
    assert len(rate_of) == len(list(model.parameters()))


def test_saved_and_read_back(folder, sample_rows, tmp_path):
    """Pooler and skip are in the saved model: it predicts the same without the reward model's folder."""
    rows = sample_rows.head(24)
    examples = encode(rows, folder)
    model, config = start(folder, examples, max_length=48, start_from="none")
    save_model(tmp_path, model, load_backbone(str(folder), 48), config)
    saved = load_model(tmp_path)
    np.testing.assert_array_equal(saved.predict_proba(saved.read_inputs(rows)), predict(model, examples))


def test_what_is_no_reward_model_is_refused(home, backbone_folders, tmp_path, capsys):
    """An encoder, before the folder is claimed; two outputs; and one without its last layer: one message each."""
    assert cli.main(run_arguments(home, tmp_path / "run", f"init_from={home / 'backbone'}")) == 2
    assert (
        "is BertModel, with 2 outputs. A reward model is" in capsys.readouterr().err and not (tmp_path / "run").exists()
    )
    broken = shutil.copytree(backbone_folders["bert"], tmp_path / "broken")
    config = read_json(broken / "config.json") | {"architectures": ["BertForSequenceClassification"]}
    for outputs, why in ((2, r"is BertForSequenceClassification, with 2 outputs\. A reward model"),
                         (1, r"missing or of another shape: .*classifier")):  # fmt: skip
        write_json(broken / "config.json", config | {"id2label": {str(n): f"LABEL_{n}" for n in range(outputs)}})
        with pytest.raises(UserError, match=why):
            build_model(broken, RunConfig(init_from=str(broken)))
