"""Training a cross-encoder: one of the two orders of A and B a step. How it predicts is in test_model.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_arguments
from test_model import encode, make_model
from test_train import LEARNS, fit, make_config
from test_train import make_model as new_model
from torch import nn

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.step import accumulate_gradients


def test_a_training_step_costs_one_sequence_a_pair(tiny, sample_rows):
    """Half the tokens of both orders, and the gradient is that of the one order, whatever the micro-batches."""
    examples = encode(sample_rows.head(16), tiny, "cross")
    drawn, model = examples.in_random_order(0, 0), make_model(tiny, architecture="cross")
    ids = [torch.as_tensor(drawn.token_ids[side], dtype=torch.long)[None] for side in drawn.sides[:, 0]]
    u = torch.cat([model.encoder(input_ids=one).last_hidden_state.mean(dim=1) for one in ids])
    nn.functional.cross_entropy(model.head(u, None), torch.as_tensor(drawn.labels)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_tokens in (10**6, 100):
        _, tokens = accumulate_gradients(model, drawn, np.arange(16), 16, max_tokens, 0.0, make_accelerator("no"))
        assert tokens.real == drawn.lengths.sum() < 0.6 * examples.lengths.sum()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=2e-6, rtol=1e-3)


def make_sequences(num_rows: int, seed: int) -> Examples:
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
    return Examples(token_ids, np.arange(2 * num_rows).reshape(-1, 2), labels)


def test_it_learns_which_answer_is_first(tiny):
    """The verdict can only be told by where in the sequence token 50 stands: to less than half the prior's loss."""
    config, train = make_config(architecture="cross", num_epochs=10, seed=1, **LEARNS), make_sequences(256, 1)
    model = new_model(tiny, config, (1 / 3, 1 / 3, 1 / 3))
    result = fit(model, config, train=train, valid=make_sequences(60, 2))
    assert result.history["valid_log_loss"].iloc[-1] < 0.5
    assert result.tokens.real == 10 * train.lengths[:, 0].sum()


def test_settings_that_contradict_it_stop_the_run(home, tmp_path, capsys):
    """A head that joins two answers, a reward model that reads one, and a Siamese run's folder do not fit."""
    with pytest.raises(UserError, match=r"head='concat'.*cross-encoder"):
        RunConfig(architecture="cross", head="concat")
    with pytest.raises(UserError, match=r"init_from.*architecture=siamese"):
        RunConfig(architecture="cross", init_from="some/reward-model")
    config = RunConfig(backbone=str(home / "backbone"))
    RunFolder(tmp_path).open(config, {"train": "1", "test": "2"})
    with pytest.raises(UserError, match="architecture='siamese', this one has architecture='cross'"):
        RunFolder(tmp_path).open(replace(config, architecture="cross"), {"train": "1", "test": "2"})
    assert cli.main(run_arguments(home, tmp_path / "run", "architecture=cros")) == 2
    assert "Did you mean 'cross'?" in capsys.readouterr().err
