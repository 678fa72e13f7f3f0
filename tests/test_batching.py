"""Steps of whole pairs and batches of nearly equal length, worked out by hand."""

import numpy as np
import pytest
import torch

from prefcls_lib.data.batching import Examples, TokenCount, make_padded_batches, padding_for, plan_epoch, split_batch
from prefcls_lib.data.features import SIGNS


def lengths_of(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 60, (num_rows, 2))


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 8), (8, 8), (9, 8), (203, 8), (50, 64)])
def test_epoch_holds_every_row_once(num_rows, batch_size):
    """Whatever divides or does not divide: no row is lost or doubled, and at most one step is short."""
    steps = plan_epoch(lengths_of(num_rows), batch_size, seed=1, epoch=0)
    assert sorted(np.concatenate(steps).tolist()) == list(range(num_rows))
    sizes = sorted(len(step) for step in steps)
    assert sizes[1:] == [batch_size] * (len(steps) - 1)
    assert len(steps) == -(-num_rows // batch_size)


def test_epoch_is_fixed_by_seed_and_number():
    """The same twice; another epoch or another seed has other steps, not only another order of them."""
    lengths = lengths_of(200)
    plans = {key: plan_epoch(lengths, 8, *key) for key in ((1, 0), (1, 1), (2, 0))}
    again = plan_epoch(lengths, 8, 1, 0)
    assert [step.tolist() for step in plans[1, 0]] == [step.tolist() for step in again]
    sets = {key: {frozenset(step.tolist()) for step in plan} for key, plan in plans.items()}
    assert not sets[1, 0] & sets[1, 1]
    assert not sets[1, 0] & sets[2, 0]


def test_pairs_of_a_step_are_alike():
    """The spread of lengths inside a step is a fraction of that among all rows."""
    lengths = lengths_of(640)
    totals = lengths.sum(axis=1)
    inside = np.mean([totals[step].std() for step in plan_epoch(lengths, 8, 0, 0)])
    assert inside < totals.std() / 3


def test_steps_come_in_no_order_of_length():
    """Short steps first would be a curriculum nobody asked for: first and last half are alike."""
    lengths = lengths_of(1600)
    means = [lengths[step].sum(axis=1).mean() for step in plan_epoch(lengths, 8, 0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_micro_batches_by_hand():
    """Rows of 10, 30, 20, 50 tokens under a cap of 40, sorted by their longer side."""
    lengths = np.array([[5, 5], [10, 20], [12, 8], [25, 25]])
    micro_batches = split_batch(np.array([3, 1, 0, 2]), lengths, max_tokens=40)
    assert [rows.tolist() for rows in micro_batches] == [
        [0, 2],
        [1],
        [3],
    ]  # 10 + 20; 30; 50 alone is over the cap


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10**9])
def test_micro_batches_hold_whole_pairs_under_the_cap(max_tokens):
    """Every row once; only a micro-batch of a single pair may be over the cap."""
    lengths = lengths_of(40)
    step = np.random.default_rng(3).permutation(40)[:32]
    micro_batches = split_batch(step, lengths, max_tokens)
    assert sorted(np.concatenate(micro_batches).tolist()) == sorted(step.tolist())
    assert all(len(rows) == 1 or lengths[rows].sum() <= max_tokens for rows in micro_batches)
    if max_tokens == 10**9:
        assert len(micro_batches) == 1


SIDES = [np.array(ids, dtype=np.int32) for ids in ([7, 8], [1, 2, 3, 4], [5], [1, 2, 3, 9], [6, 6])]


def test_padded_batches_by_hand():
    """Longest first (equal lengths: the larger ids first), padded on the right to the padded batch's longest."""
    first, second, third = make_padded_batches(SIDES, pad_id=0, max_sides=2)
    assert first.indices.tolist() == [3, 1]
    assert first.input_ids.tolist() == [[1, 2, 3, 9], [1, 2, 3, 4]]
    assert first.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert second.indices.tolist() == [0, 4]
    assert second.input_ids.tolist() == [[7, 8], [6, 6]]
    assert third.indices.tolist() == [2]
    assert third.input_ids.tolist() == [[5]]


def test_padding_by_hand():
    """Lengths are rounded up to 8; the padding is masked and not counted as useful."""
    (batch,) = make_padded_batches([np.array([5, 5]), np.arange(1, 8), np.arange(11, 17)], pad_id=99, multiple_of=4)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 99],
        [11, 12, 13, 14, 15, 16, 99, 99],
        [5, 5, 99, 99, 99, 99, 99, 99],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [7, 6, 2]
    assert batch.indices.tolist() == [1, 2, 0]
    assert batch.tokens_computed == 24
    assert TokenCount(15, 24).useful_share == 0.625


def test_padded_batches_are_cut_where_it_is_cheapest():
    """A padded batch costs 128 tokens: 199 beside 200 pads 1; three of 100 would pad 300, one pads 100."""
    sides = [np.arange(length) for length in (200, 100, 100, 199, 100)]
    lengths = [batch.attention_mask.sum(dim=1).tolist() for batch in make_padded_batches(sides, 0)]
    assert lengths == [[200, 199], [100, 100, 100]]
    (one,) = make_padded_batches(sides[:2], 0)
    assert one.attention_mask.sum(dim=1).tolist() == [200, 100]


def test_another_batch_costs_more_on_a_gpu():
    """200 and 30 tokens: one batch pads 170, which is more than 128 and less than 256; on a GPU lengths are rounded."""
    sides = [np.arange(length) for length in (201, 30)]
    on = {kind: make_padded_batches(sides, 0, **padding_for(torch.device(kind))) for kind in ("cpu", "cuda")}
    assert [tuple(batch.input_ids.shape) for batch in on["cpu"]] == [(1, 201), (1, 30)]
    assert [tuple(batch.input_ids.shape) for batch in on["cuda"]] == [(2, 208)]


def test_padded_batch_caps():
    """At most 8 places in a padded batch: two sides of 4, then three in places of 2; a side over the cap goes alone."""
    assert [len(batch.indices) for batch in make_padded_batches(SIDES, 0, max_tokens=8)] == [2, 3]
    assert [len(batch.indices) for batch in make_padded_batches(SIDES, 0, max_tokens=3)] == [1, 1, 1, 1, 1]
    assert [len(batch.indices) for batch in make_padded_batches([SIDES[0]] * 5, 0, max_sides=2)] == [1, 2, 2]


def test_padded_batches_do_not_depend_on_the_order_of_the_sides():
    """Only on their ids: this is what makes a swap of A and B exact."""
    order = [4, 2, 0, 3, 1]
    plain, shuffled = (make_padded_batches(sides, 0, 2) for sides in (SIDES, [SIDES[i] for i in order]))
    for one, other in zip(plain, shuffled, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.indices.tolist() == [order[i] for i in other.indices]


def test_token_counts_add_up():
    """Shares are of sums, not means of shares; nothing computed is nothing wasted."""
    assert TokenCount(1, 2) + TokenCount(3, 8) == TokenCount(4, 10)
    assert (TokenCount(1, 2) + TokenCount(3, 8)).useful_share == 0.4
    assert TokenCount().useful_share == 1.0


def test_swapped_examples_swap_back():
    """Sides and verdict change places, antisymmetric features their sign; twice is the same rows again."""
    features = np.random.default_rng(0).normal(size=(2, len(SIGNS))).astype(np.float32)
    examples = Examples(SIDES, np.array([[0, 1], [2, 2]]), features, np.array([0, 2]))
    swapped = examples.swapped()
    assert swapped.sides.tolist() == [[1, 0], [2, 2]]
    assert (swapped.features == features * SIGNS).all()
    assert swapped.labels.tolist() == [1, 2]
    assert examples.lengths.tolist() == [[2, 4], [1, 1]]
    assert swapped.lengths.tolist() == [[4, 2], [1, 1]]
    assert (swapped.swapped().features == features).all()


def test_random_order_takes_each_row_as_it_is_or_swapped():
    """Side, features and label of a row always come from the same order; about half are swapped, others each epoch."""
    random = np.random.default_rng(0)
    features = random.normal(size=(400, len(SIGNS))).astype(np.float32)
    examples = Examples(SIDES, np.tile([[3, 4]], (400, 1)), features, random.integers(0, 3, 400))
    swapped, drawn = examples.swapped(), examples.in_random_order(seed=1, epoch=0)
    is_swapped = drawn.sides[:, 0] == 4
    assert 150 < is_swapped.sum() < 250
    for name in ("features", "labels"):
        whole, other, got = (getattr(e, name) for e in (examples, swapped, drawn))
        assert (got[~is_swapped] == whole[~is_swapped]).all()
        assert (got[is_swapped] == other[is_swapped]).all()
    assert drawn.features.dtype == np.float32
    assert drawn.lengths.tolist() == [[len(SIDES[side])] for side in drawn.sides[:, 0]]
    assert (examples.in_random_order(1, 0).sides == drawn.sides).all()
    assert (examples.in_random_order(1, 1).sides != drawn.sides).any()
    assert (examples.in_random_order(2, 0).sides != drawn.sides).any()
