"""Training within the memory there is: smaller micro-batches where it runs out, and nothing else changes."""

from unittest.mock import Mock

import pytest
import torch
from test_train import assert_same_weights, fit, make_config, make_model

from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import step, validation
from prefcls_lib.training.checkpoint import TrainingState

PLAIN = {"num_epochs": 1}
GUISES = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "nccl": RuntimeError("NCCL error in: NCCLUtils.cpp:94\nLast error:\nFailed to CUDA calloc 608 bytes"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
}
PLACES = {"gradients": (step, "accumulate_gradients"), "validation": (validation, "embed_unique_sides")}


@pytest.fixture(scope="module")
def undisturbed(tiny):
    """A model after one epoch."""
    model = make_model(tiny, make_config(**PLAIN))
    fit(model, make_config(**PLAIN))
    return model


@pytest.mark.parametrize(
    ("place", "guise"), [*((place, "torch") for place in PLACES), *(("gradients", guise) for guise in GUISES)]
)
def test_out_of_memory_is_repeated(tiny, undisturbed, monkeypatch, capsys, place, guise):
    """Once, in whatever words; the repeat ends with the weights of an undisturbed run."""
    owner, name = PLACES[place]
    real, failures = getattr(owner, name), iter([GUISES[guise]])

    def fail_once(*args, **kwargs):
        for failure in failures:
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail_once)
    model = make_model(tiny, make_config(**PLAIN))
    fit(model, make_config(**PLAIN))
    assert capsys.readouterr().out.count("out of memory: max_tokens_per_micro_step is now 4096") == 1
    assert_same_weights(undisturbed, model)


def test_micro_batches_are_halved_until_they_fit(tiny, monkeypatch):
    """2,048, 1,024, 512 tokens, which stay; the weights are those of this cap from the start."""
    real, caps = step.accumulate_gradients, []

    def limited(model, examples, rows, batch_size, max_tokens, *rest):
        caps.append(max_tokens)
        if max_tokens > 512:
            raise GUISES["torch"]
        return real(model, examples, rows, batch_size, max_tokens, *rest)

    models = []
    for cap in (512, 2048):
        models.append(make_model(tiny, make_config(**PLAIN)))
        fit(models[-1], make_config(**PLAIN, max_tokens_per_micro_step=cap))
        monkeypatch.setattr(step, "accumulate_gradients", limited)
    assert caps[:4] == [2048, 1024, 512, 512]
    assert_same_weights(*models)


def test_only_memory_is_taken_for_memory(tiny, monkeypatch):
    """Another error is raised as it is; nothing is halved for ever, nor an update repeated, part of which is done."""

    state, shapes = TrainingState(8192), RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        step.within_memory(Mock(side_effect=shapes), state, print)
    monkeypatch.setattr(step, "update_weights", Mock(side_effect=GUISES["nccl"]))
    with pytest.raises(UserError, match=r"out of memory with 8192 .*gradient_checkpointing=true"):
        fit(make_model(tiny, make_config(**PLAIN)), make_config(**PLAIN))
    monkeypatch.setattr(step, "accumulate_gradients", Mock(side_effect=GUISES["cpu"]))
    with pytest.raises(UserError, match=r"out of memory with \d+ tokens .*max_length lower"):
        fit(make_model(tiny, make_config(**PLAIN)), make_config(**PLAIN))
