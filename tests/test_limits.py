"""Training within the time and the memory there are: fewer steps, smaller micro-batches, and nothing else changes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefcls_lib.training.state import Session, TrainingState
from test_resume import fit
from test_train import make_config, make_examples, make_model

from prefcls_lib.data.batching import TokenCount
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop, optim
from prefcls_lib.training import step as steps

TOKENS_PER_SECOND = 1000.0


def test_steps_in_time_by_hand():
    """Five steps are done; the next five have 10, 40, 10, 10, 50 tokens; 20 for a validation after steps 7 and 10."""
    ahead, validations = np.array([10, 40, 10, 10, 50]), {2, 7, 10}
    needed = [10 + 20, 50 + 20, 60 + 40, 70 + 40, 120 + 40]  # the last step is validated, whichever it is
    for count, tokens in enumerate(needed, start=1):
        assert optim.steps_in_time(5, ahead, validations, 20, tokens) == 5 + count
        assert optim.steps_in_time(5, ahead, validations, 20, tokens - 1) == 5 + count - 1
    assert optim.steps_in_time(5, ahead, validations, 20, -1000) == 5
    assert optim.steps_in_time(10, ahead[:0], validations, 20, 1000) == 10


class FakeTime:
    """A clock that only computing moves: a step takes `slow(n)` times the seconds of its tokens, a validation half."""

    def __init__(self, monkeypatch, slow):
        self.now, self.steps = 5000.0, 0

        def train_step(model, examples, batch, *_):
            tokens = int(examples.lengths[batch].sum())
            self.now += slow(self.steps) * tokens / TOKENS_PER_SECOND
            self.steps += 1
            return torch.tensor(float(len(batch))), TokenCount(tokens, tokens)

        def embed_unique_sides(model, examples, *_):
            self.now += 0.5 * examples.lengths.sum() / TOKENS_PER_SECOND
            return torch.zeros(len(examples.token_ids), 32), TokenCount()

        monkeypatch.setattr(steps, "train_step", train_step)
        monkeypatch.setattr(steps, "embed_unique_sides", embed_unique_sides)
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))


def train_in_time(tiny, monkeypatch, budget: float, slow) -> tuple[int, float, float]:
    """Steps taken of 300, seconds left, and seconds given: `budget` times what they need with all that follows."""
    config = make_config(num_epochs=3, batch_size=4, validations_per_epoch=4, structure_features=False)
    train, valid = make_examples(400, 1, longest=60), make_examples(60, 2)
    to_predict = 2000
    need = (3 * train.lengths.sum() + 12 * valid.lengths.sum() + to_predict) / TOKENS_PER_SECOND
    clock = FakeTime(monkeypatch, slow)
    session = Session(deadline=clock.now + budget * need, tokens_to_predict=to_predict)
    loop.fit(make_model(tiny, config), train, valid, config, make_accelerator("no"), 0, "fold", session)
    return clock.steps, session.deadline - clock.now, budget * need


@pytest.mark.parametrize("budget", [1.5, 2.0])
def test_first_step_and_unequal_lengths_cost_no_steps(tiny, monkeypatch, capsys, budget):
    """The first step takes ten times its tokens' time. With half more time than needed all steps are taken."""
    steps_taken, *_ = train_in_time(tiny, monkeypatch, budget, lambda step: 10 if step == 0 else 1)
    assert steps_taken >= 0.95 * 300
    assert "time budget" not in capsys.readouterr().out


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.8])
def test_too_little_time_is_used_and_kept(tiny, monkeypatch, capsys, budget):
    """Fewer steps, logged; the time that is left is for the prediction, and little more."""
    steps_taken, left, seconds = train_in_time(tiny, monkeypatch, budget, lambda step: 1)
    assert "time budget: at 1,000 tokens/s" in capsys.readouterr().out
    assert 0 < steps_taken < 300
    assert 2.0 <= left <= 2.0 + 0.3 * seconds  # 2,000 tokens are to be predicted


def test_plan_grows_again(tiny, monkeypatch, capsys):
    """A slow start cuts the plan; at the pace that follows all steps fit again, and are taken."""
    steps_taken, left, _ = train_in_time(tiny, monkeypatch, 1.6, lambda step: 4 if step < 10 else 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "time budget" in line]
    assert "of 300 steps fit" in lines[0]
    assert int(lines[0].split(" tokens/s ")[1].split()[0]) < 200
    assert steps_taken == 300
    assert left > 0


def test_resumed_plan_grows_to_the_whole_again(tiny, monkeypatch, tmp_path):
    """A session with too little time is stopped; one with plenty takes every step of the settings."""
    config = make_config(num_epochs=4, batch_size=4, structure_features=False)
    clock = FakeTime(monkeypatch, lambda step: 1)
    stop = SimpleNamespace(is_set=lambda: clock.steps >= 8)
    for session in (
        Session(tmp_path / "state", clock.now + 4, stop=stop),
        Session(tmp_path / "state", clock.now + 1e4),
    ):
        model = make_model(tiny, config)
        try:
            loop.fit(model, make_examples(48, 1), make_examples(12, 2), config, make_accelerator("no"), 0, "", session)
        except KeyboardInterrupt:
            assert clock.steps == 8
    assert clock.steps == 48


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tiny, monkeypatch, capsys):
    """Logged once a halving; the same step is repeated, so the weights are those of a small cap from the start."""
    config = make_config(structure_features=False, max_tokens_per_micro_step=2048)
    real, caps = steps.train_step, []

    def limited(model, examples, batch, max_tokens, *rest):
        caps.append(max_tokens)
        if max_tokens > 512:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, examples, batch, max_tokens, *rest)

    small = make_model(tiny, config)
    fit(small, replace(config, max_tokens_per_micro_step=512))
    monkeypatch.setattr(steps, "train_step", limited)
    model = make_model(tiny, config)
    fit(model, config)
    assert caps[:4] == [2048, 1024, 512, 512]
    assert "max_tokens_per_micro_step is now 512" in capsys.readouterr().out
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in small.state_dict().items())


def test_not_even_small_micro_batches_fit(tiny, monkeypatch):
    """The cap is not halved for ever: the message names the settings that help."""

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps, "train_step", never)
    config = make_config(structure_features=False)
    with pytest.raises(UserError, match="gradient_checkpointing=true"):
        fit(make_model(tiny, config), config)


GUISES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nFailed to CUDA calloc 608 bytes"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
)


@pytest.mark.parametrize("error", GUISES, ids=["torch", "cublas", "nccl", "cpu"])
@pytest.mark.parametrize("place", ["train_step", "sum_gradients", "clip", "update", "embed_unique_sides"])
def test_out_of_memory_anywhere_is_repeated(tiny, monkeypatch, capsys, place, error):
    """Once in each part of a step, in whatever words; the repeat ends with the weights of an undisturbed run."""
    owner, name = {
        "clip": (torch.nn.utils, "clip_grad_norm_"),
        "update": (torch.optim.AdamW, "step"),
        "sum_gradients": (loop, "sum_gradients"),
    }.get(place, (steps, place))
    config = make_config(num_epochs=1, structure_features=False)
    expected = make_model(tiny, config)
    fit(expected, config)
    real, calls = getattr(owner, name), []

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_once)
    model = make_model(tiny, config)
    fit(model, config)
    assert capsys.readouterr().out.count("out of memory: max_tokens_per_micro_step is now 4096") == 1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_only_memory_is_taken_for_memory():
    """Another error is raised as it is; and in a collective nothing is repeated, for the others would wait."""

    def raise_error(error: Exception):
        raise error

    state = TrainingState(6, 8192)
    with pytest.raises(RuntimeError, match="shapes"):
        steps.within_memory(lambda: raise_error(RuntimeError("shapes cannot be multiplied")), state, print)
    with pytest.raises(UserError, match=r"out of memory with 8192 .*gradient_checkpointing=true"):
        steps.within_memory(lambda: raise_error(GUISES[2]), state, print, repeat=False)
    assert state.max_tokens == 8192
