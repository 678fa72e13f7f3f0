"""Steps of whole pairs and batches of nearly equal length, worked out by hand."""

import numpy as np
import pytest
import torch

from prefcls_lib.data.batching import (
    Examples,
    TokenCount,
    pad_batch,
    plan_epoch,
    plan_padded_batches,
    split_batch,
)
from prefcls_lib.data.schema import SWAP

SIDES = [np.array(ids, dtype=np.int32) for ids in ([7, 8], [1, 2, 3, 4], [5], [1, 2, 3, 9], [6, 6])]


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
    one, same, *others = ([tuple(step) for step in plan_epoch(lengths_of(200), 8, *key)]
                          for key in ((1, 0), (1, 0), (1, 1), (2, 0)))  # fmt: skip
    sets = [set(map(frozenset, plan)) for plan in (one, *others)]
    assert one == same and not sets[0] & sets[1] and not sets[0] & sets[2]


def test_pairs_of_a_step_are_alike_and_steps_come_in_no_order_of_length():
    """The spread inside a step is a fraction of that among all rows; short steps first would be a curriculum."""
    totals = (lengths := lengths_of(1600)).sum(axis=1)
    steps = plan_epoch(lengths, 8, 0, 0)
    assert np.mean([totals[step].std() for step in steps]) < totals.std() / 3
    assert abs(np.corrcoef([totals[step].mean() for step in steps], np.arange(len(steps)))[0, 1]) < 0.2


def test_micro_batches_by_hand():
    """Rows of 10, 30, 20, 50 tokens under a cap of 40, by their longer side: 10 + 20; 30; 50 alone is over it."""
    lengths = np.array([[5, 5], [10, 20], [12, 8], [25, 25]])
    micro_batches = split_batch(np.array([3, 1, 0, 2]), lengths, max_tokens=40)
    assert [rows.tolist() for rows in micro_batches] == [[0, 2], [1], [3]]


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10**9])
def test_micro_batches_hold_whole_pairs_under_the_cap(max_tokens):
    """Every row once; only a micro-batch of a single pair may be over the cap."""
    lengths = lengths_of(40)
    step = np.random.default_rng(3).permutation(40)[:32]
    micro_batches = split_batch(step, lengths, max_tokens)
    assert sorted(np.concatenate(micro_batches).tolist()) == sorted(step.tolist())
    assert all(len(rows) == 1 or lengths[rows].sum() <= max_tokens for rows in micro_batches)
    assert len(micro_batches) == 1 or max_tokens < 10**9


def test_padded_batches_by_hand():
    """Longest first (equal lengths: larger ids first), padded on the right and masked; numbers are the caller's. The
    batches depend on the ids alone, not on the order of the sides: this is what makes a swap of A and B exact."""
    planned = plan_padded_batches(SIDES, max_sides=3)
    assert planned == [([3, 1, 0], 4), ([4, 2], 2)]
    first, second = (pad_batch(*one, SIDES, 99) for one in planned)
    assert first["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 3, 4], [7, 8, 99, 99]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[6, 6], [5, 99]]
    order = [4, 2, 0, 3, 1]
    shuffled = plan_padded_batches([SIDES[i] for i in order], max_sides=3)
    assert [([order[i] for i in taken], length) for taken, length in shuffled] == planned


@pytest.mark.parametrize(
    ("kind", "lengths", "limits", "expected"),
    [
        # most padding, 128: 1 and 100 are 101, another 100 would be 201; exactly 128 is taken, 129 is not
        ("cpu", [200, 100, 100, 199, 100], {}, [[200, 199, 100], [100, 100]]),
        ("cpu", [228, 100, 227, 98], {}, [[228, 227], [100, 98]]),
        ("cpu", [228, 100], {}, [[228, 100]]),
        # most sides, most tokens (4 sides of 4 are 16, a fifth would be 20), and a side over the cap alone
        ("cpu", [2, 2, 2, 2, 2], {"max_sides": 2}, [[2, 2], [2, 2], [2]]),
        ("cpu", [4, 3, 2, 1, 1], {"max_tokens": 16}, [[4, 3, 2, 1], [1]]),
        ("cpu", [9, 2, 1], {"max_tokens": 8}, [[9], [2, 1]]),
        # on a GPU most padding is 256, and 301 and 300 are rounded up to 304; what this adds does not count as padding
        ("cuda", [301, 300, 48], {}, [[301, 300, 48]]),
        ("cuda", [301, 300, 40], {}, [[301, 300], [40]]),
    ],
)
def test_greedy_cuts_by_hand(kind, lengths, limits, expected):
    """A batch takes the next shorter side until a limit is reached; it is padded to its longest."""
    planned = plan_padded_batches([np.arange(length) for length in lengths], torch.device(kind), **limits)
    assert [[lengths[side] for side in taken] for taken, _ in planned] == expected
    assert [length for _, length in planned] == [
        -(-taken[0] // 8) * 8 if kind == "cuda" else taken[0] for taken in expected
    ]


def test_token_counts_add_up():
    """Shares are of sums, not means of shares; nothing computed is nothing wasted."""
    assert TokenCount(1, 2) + TokenCount(3, 8) == TokenCount(4, 10)
    assert (TokenCount(1, 2) + TokenCount(3, 8)).useful_share == 0.4
    assert TokenCount().useful_share == 1.0


def test_swapped_examples_swap_back():
    """Sides, verdict and offsets of A and B change places; twice is the same rows again."""
    offsets = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    examples = Examples(SIDES, np.array([[0, 1], [2, 2]]), np.array([0, 2]), offsets)
    swapped = examples.swapped()
    assert (swapped.sides.tolist(), swapped.labels.tolist()) == ([[1, 0], [2, 2]], [1, 2])
    assert (swapped.offsets == offsets[:, SWAP]).all() and (swapped.swapped().offsets == offsets).all()
    assert (examples.lengths.tolist(), swapped.lengths.tolist()) == ([[2, 4], [1, 1]], [[4, 2], [1, 1]])


def test_random_order_takes_each_row_as_it_is_or_swapped():
    """Side, offset and label of a row always come from the same order; about half are swapped, others each epoch."""
    random = np.random.default_rng(0)
    offsets = random.normal(size=(400, 3)).astype(np.float32)
    examples = Examples(SIDES, np.tile([[3, 4]], (400, 1)), random.integers(0, 3, 400), offsets)
    swapped, drawn = examples.swapped(), examples.in_random_order(seed=1, epoch=0)
    is_swapped = drawn.sides[:, 0] == 4
    assert 150 < is_swapped.sum() < 250
    for name in ("offsets", "labels"):
        whole, other, got = (getattr(e, name) for e in (examples, swapped, drawn))
        assert (got[~is_swapped] == whole[~is_swapped]).all()
        assert (got[is_swapped] == other[is_swapped]).all()
    assert drawn.offsets.dtype == np.float32
    assert drawn.lengths.tolist() == [[len(SIDES[side])] for side in drawn.sides[:, 0]]
    assert (examples.in_random_order(1, 0).sides == drawn.sides).all()
    assert (examples.in_random_order(1, 1).sides != drawn.sides).any()
    assert (examples.in_random_order(2, 0).sides != drawn.sides).any()
