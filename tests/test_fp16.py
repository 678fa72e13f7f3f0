"""Half precision with a scaled loss, as on a T4, run on the CPU; and what such a run leaves in memory."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_resume import StopAt
from test_train import LEARNS, assert_same_weights, fit, make_config, make_model

from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training import loop
from prefcls_lib.training.checkpoint import Session, Stopped


def make_fp16_accelerator(scale: float = 2.0**16, growth_interval: int = 2000) -> Accelerator:
    """fp16 autocast and gradient scaling on the CPU, where accelerate offers neither."""
    accelerator = make_accelerator("no")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
    return accelerator


def test_fp16_learns_as_fp32(tiny):
    """The same losses to two digits, of training and on rows that were not trained on; something was learned."""
    config, histories = make_config(num_epochs=4, **LEARNS), []
    for accelerator in (make_fp16_accelerator(), make_accelerator("no")):
        histories.append(fit(make_model(tiny, config), config, accelerator=accelerator).history)
    for name in ("train_log_loss", "valid_log_loss"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], atol=0.01)
    assert histories[0]["train_log_loss"].iloc[-1] < 0.9 and histories[0]["skipped_steps"].iloc[-1] == 0


def test_skipped_steps_are_counted_exactly(tiny):
    """The scale starts at 2^26; each overflow halves it and is one skipped step, so the scale tells their number."""
    config = make_config(num_epochs=6, validations_per_epoch=3, **LEARNS)
    accelerator = make_fp16_accelerator(2.0**26)
    result = fit(make_model(tiny, config), config, accelerator=accelerator)
    skipped = result.history["skipped_steps"]
    assert 2 <= skipped.iloc[-1] == 26 - math.log2(accelerator.scaler.get_scale())
    is_skipped = skipped.diff(1).fillna(skipped[0]) == 1  # every step is validated
    assert is_skipped.sum() == skipped.iloc[-1]
    assert (result.history["train_log_loss"].isna() == is_skipped).all()
    losses = result.history["valid_log_loss"]
    assert ((losses.diff(1) == 0) == is_skipped).all()  # and the weights stay as they were


def test_stopped_and_resumed_in_fp16_ends_the_same(tiny, tmp_path):
    """Scale, its growth counter, dropout and weights to the bit, stopped while steps are still skipped and after."""
    config = make_config(num_epochs=4, dropout=0.1, **LEARNS)
    whole, accelerator = make_model(tiny, config), make_fp16_accelerator(2.0**26, 3)
    expected = fit(whole, config, accelerator=accelerator)
    for step in (1, 6):
        given = {"session": Session(tmp_path / "state", stop=StopAt(step))}
        with pytest.raises(Stopped):
            fit(make_model(tiny, config), config, accelerator=make_fp16_accelerator(2.0**26, 3), **given)
    model, again = make_model(tiny, config), make_fp16_accelerator(growth_interval=3)
    result = fit(model, config, session=Session(tmp_path / "state"), accelerator=again)
    assert_same_weights(model, whole)
    assert again.scaler.state_dict() == accelerator.scaler.state_dict()
    np.testing.assert_array_equal(result.valid_probs, expected.valid_probs)
    assert result.history["skipped_steps"].equals(expected.history["skipped_steps"])


def test_finished_model_leaves_nothing_in_memory(tiny, monkeypatch):
    """Weights and moments are freed when `fit` and its caller are done: nothing waits for the garbage collector."""
    optimizers, real = [], loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda *args: optimizers.append(real(*args)) or optimizers[-1])
    config = make_config(num_epochs=1, **LEARNS)
    model = make_model(tiny, config)
    gc.collect()
    gc.disable()
    try:
        fit(model, config, accelerator=make_fp16_accelerator())
        state = optimizers.pop().state
        kept = [weakref.ref(model), weakref.ref(next(iter(state.values()))["exp_avg"])]
        del model, state
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
