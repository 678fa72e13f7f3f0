"""The network on a baseline: exact swaps, the loss by hand, and how its encoder still learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import SIGNS
from prefcls_lib.data.schema import SWAP
from prefcls_lib.models.network import PreferenceHead
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.training.optim import parameter_groups
from prefcls_lib.training.step import training_loss


def make_head(**settings) -> PreferenceHead:
    """A head on a baseline, its last layers not at zero."""
    torch.manual_seed(0)
    head = PreferenceHead(8, True, True, 0.0, on_baseline=True, **settings)
    for layer in (head.output, head.correction, head.wide):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return head


def random_inputs(rows: int = 5):
    """u, v (B, 8), structure features and offsets (m, -m, t) of some rows."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, rows, 8, generator=generator)
    m, t = torch.randn(2, rows, generator=generator)
    return u, v, torch.randn(rows, len(SIGNS), generator=generator), torch.stack([m, -m, t], dim=1)


@pytest.mark.parametrize("architecture", ["siamese", "cross"])
def test_head_on_a_baseline_is_exactly_order_equivariant(architecture):
    """A and B in each other's place permute both outputs, to the bit."""
    head, (u, v, x, offset) = make_head(architecture=architecture), random_inputs()
    swapped = head.outputs(v, u, x * head.signs, offset[:, list(SWAP)])
    for found, other in zip(head.outputs(u, v, x, offset), swapped, strict=True):
        assert torch.equal(other[:, list(SWAP)], found)


def test_untrained_network_predicts_what_the_baseline_does():
    """With its last layers at zero the correction is zero, and the auxiliary output is the prior."""
    head, (u, v, x, offset) = make_head(), random_inputs()
    head.start_at_prior((0.5, 0.25, 0.25))
    logits, auxiliary = head.outputs(u, v, x, offset)
    assert torch.equal(logits, offset)
    assert torch.softmax(auxiliary, dim=1)[0].tolist() == pytest.approx([0.375, 0.375, 0.25])


def test_loss_on_a_baseline_by_hand():
    """Cross-entropy of both outputs: labels A, tie; logits 0 have ln 3 each, the offset's probability 1/2 has ln 2."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    examples = Examples([], np.zeros((2, 2), dtype=int), labels=np.array([0, 2]), offsets=np.zeros((2, 3), np.float32))
    found = training_loss((logits, torch.zeros(2, 3)), examples, np.arange(2), label_smoothing=0.0)
    assert float(found) == pytest.approx(2 * np.log(2) + 2 * np.log(3))
    alone = training_loss((logits, torch.zeros(2, 3)), replace(examples, offsets=None), np.arange(2), 0.0)
    assert float(alone) == pytest.approx(2 * np.log(2))


def test_encoder_learns_beside_a_perfect_offset():
    """Where the offset explains every label, the correction has no gradient, and the auxiliary output still has."""
    head, (u, v, x, _) = make_head(), random_inputs()
    u.requires_grad_()
    offset = torch.tensor([[40.0, -40.0, -40.0]]).repeat(5, 1)
    logits, auxiliary = head.outputs(u, v, x, offset)
    examples = Examples([], np.zeros((5, 2), dtype=int), labels=np.zeros(5, dtype=int), offsets=offset.numpy())
    (alone,) = torch.autograd.grad(
        training_loss((logits, auxiliary), replace(examples, offsets=None), np.arange(5), 0.0), u, retain_graph=True
    )
    (both,) = torch.autograd.grad(training_loss((logits, auxiliary), examples, np.arange(5), 0.0), u)
    assert float(alone.abs().max()) < 1e-6
    assert float(both.abs().max()) > 1e-3


def test_correction_learns_slower_than_the_head(tiny):
    """The head's rate is 5e-4 and the correction's 2e-4: it starts at a good prediction."""
    config = RunConfig(start_from="structure_logistic").with_recipe(RECIPES["bert"])
    model = build_model(tiny, config)
    rates = {id(p): group["peak"] for group in parameter_groups(model, config) for p in group["params"]}
    assert rates[id(model.head.output.weight)] == 5e-4
    assert rates[id(model.head.correction.weight)] == rates[id(model.head.correction.bias)] == pytest.approx(2e-4)
