"""Steps of whole pairs, cut into length-sorted batches of token ids.

u and v of a pair meet only in the loss. So an optimizer step (a fixed number of whole pairs) is cut into
micro-batches of whole pairs, as many as the memory for the backward pass asks for, and inside a micro-batch all
sides are sorted by length and pass through the encoder in padded batches of nearly equal length. Little is padded, and
nothing of it changes the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from prefcls_lib.data.schema import SWAP

WINDOW_STEPS = 8  # steps whose pairs are sorted by length together, then dealt out in random order
PADDED_TOKENS = 4096  # most tokens in one padded batch, padding included
PADDED_SIDES = 64  # and most sides
PADDING_PER_BATCH = (
    128  # a padded batch holds no more tokens of padding: one more batch costs as much, measured on a CPU
)
# On a GPU, where nobody measured it: a batch costs at least the launch of its kernels, 5 to 10 us each. At an assumed
# 10 TFLOP/s that is the time of 40 tokens in ELECTRA-large, 80 in RoBERTa-base, 1,000 in DeBERTa-v3-xsmall.
PADDING_PER_BATCH_GPU = 256


@dataclass(frozen=True)
class Examples:
    """N rows as the model sees them.

    Attributes:
        token_ids: U arrays (T,) of token ids, the different sides.
        sides: (N, 2) index in `token_ids` of side 0 = A and side 1 = B; (N, 1) of the one order of A and B in which a
            cross-encoder's rows are trained on.
        labels: (N,) int64, or None where they are not known.
        offsets: (N, 3) float32 log-odds of the baseline that the network starts from, or None.
        tie_shifts: (N,) float32, added to the logit of a tie in the training loss: 0 for rows of the training file, see
            `baselines.columns.tie_shifts`; or None.
    """

    token_ids: Sequence[np.ndarray]
    sides: np.ndarray
    labels: np.ndarray | None = None
    offsets: np.ndarray | None = None
    tie_shifts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def own(self) -> np.ndarray:
        """Positions of the rows whose share of ties is that of the training file."""
        return np.arange(len(self)) if self.tie_shifts is None else np.flatnonzero(self.tie_shifts == 0)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N, 2) tokens of both sides of every row; (N, 1) where there is one."""
        return np.array([len(ids) for ids in self.token_ids])[self.sides]

    def take(self, chosen: np.ndarray | slice) -> "Examples":
        """Some of the rows; the sides stay as they are numbered."""
        return replace(self, **{name: column[chosen] for name, column in self._columns().items()})

    def swapped(self) -> "Examples":
        """The same rows with A and B in each other's place."""
        swap = {
            "sides": lambda sides: sides[:, ::-1],
            "offsets": lambda offsets: offsets[:, SWAP],
            "labels": lambda labels: np.array(SWAP)[labels],
            "tie_shifts": lambda shifts: shifts,
        }
        return replace(self, **{name: swap[name](column) for name, column in self._columns().items()})

    def in_random_order(self, seed: int, epoch: int) -> "Examples":
        """What an epoch trains a cross-encoder on: one order of A and B a row, drawn anew; sides (N, 1)."""
        swap = np.random.default_rng([seed, epoch, 1]).random(len(self)) < 0.5
        swapped = self.swapped()._columns()
        drawn = {
            name: np.where(swap if column.ndim == 1 else swap[:, None], swapped[name], column)
            for name, column in self._columns().items()
        }
        return replace(self, **drawn | {"sides": drawn["sides"][:, :1]})

    def _columns(self) -> dict[str, np.ndarray]:
        """What has a line a row, where it is known."""
        names = ("sides", "offsets", "labels", "tie_shifts")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class TokenCount:
    """Tokens that passed through the encoder: the real ones, and all that were computed, padding included."""

    real: int = 0
    computed: int = 0

    def __add__(self, other: "TokenCount") -> "TokenCount":
        return TokenCount(self.real + other.real, self.computed + other.computed)

    @property
    def useful_share(self) -> float:
        """real / computed; 1 is no padding at all."""
        return self.real / self.computed if self.computed else 1.0


@dataclass(frozen=True)
class PaddedBatch:
    """Sides of similar length, padded to the longest.

    Attributes:
        indices: (S,) which sides these are, numbered as the caller numbered them.
        input_ids: (S, T) int64.
        attention_mask: (S, T) int64, 1 on real tokens.
    """

    indices: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def tokens_computed(self) -> int:
        """Tokens that pass through the encoder, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> "PaddedBatch":
        """The same padded batch on `device`."""
        return PaddedBatch(*(to_device(t, device) for t in (self.indices, self.input_ids, self.attention_mask)))


def padding_for(device: torch.device) -> dict[str, int]:
    """`multiple_of` and `max_padding` of `plan_padded_batches` on a device: a GPU's matrix units work in tiles of 8."""
    return {"multiple_of": 8, "max_padding": PADDING_PER_BATCH_GPU} if device.type == "cuda" else {}


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; to a GPU through pinned memory, so that the host does not wait for the copy."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_padded_batches(
    token_ids: Sequence[np.ndarray], pad_id: int, *limits: int, **padding: int
) -> list[PaddedBatch]:
    """Sides cut into padded batches; the arguments are those of `plan_padded_batches`."""
    planned = plan_padded_batches(token_ids, *limits, **padding)
    return [pad_batch(taken, length, token_ids, pad_id) for taken, length in planned]


def plan_padded_batches(
    token_ids: Sequence[np.ndarray],
    max_sides: int = PADDED_SIDES,
    max_tokens: int = PADDED_TOKENS,
    multiple_of: int = 1,
    max_padding: int = PADDING_PER_BATCH,
) -> list[tuple[list[int], int]]:
    """Sort sides by length (equal lengths: by ids) and cut them into padded batches, longest first.

    A batch takes the next shorter side until a limit is reached. The longest batch comes first so that running out of
    memory shows at once.

    Args:
        token_ids: S arrays (T,) of token ids.
        max_sides, max_tokens: a padded batch holds no more than these, but always one side.
        multiple_of: padded lengths are rounded up to a multiple of this.
        max_padding: most tokens of padding in a padded batch, beside those that rounding up adds.

    Returns:
        For each padded batch the numbers of its sides, and the length that they are padded to.
    """
    order = sorted(range(len(token_ids)), key=lambda i: (len(token_ids[i]), token_ids[i].tobytes()), reverse=True)
    planned: list[tuple[list[int], int]] = []
    padding = 0
    for side in order:
        length = -(-len(token_ids[side]) // multiple_of) * multiple_of
        if planned:
            taken, longest = planned[-1]
            padding += longest - length
            if padding <= max_padding and len(taken) < max_sides and (len(taken) + 1) * longest <= max_tokens:
                taken.append(side)
                continue
        planned.append(([side], length))
        padding = 0
    return planned


def pad_batch(taken: list[int], length: int, token_ids: Sequence[np.ndarray], pad_id: int) -> PaddedBatch:
    """The padded batch of some sides, padded to `length` with `pad_id`."""
    input_ids = np.full((len(taken), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, side in enumerate(taken):
        ids = token_ids[side]
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return PaddedBatch(torch.tensor(taken), torch.from_numpy(input_ids), torch.from_numpy(attention_mask))


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The optimizer steps of one epoch: arrays of row numbers, each row once.

    All rows are shuffled and cut into windows of WINDOW_STEPS steps; inside a window pairs are sorted by length, so
    that a step's pairs are alike; then the steps of the whole epoch are shuffled. Which rows share a window, and the
    order of the steps, is new in every epoch. The last step of an epoch may be shorter.

    Args:
        lengths: (N, 2) tokens of the two sides of each row.
        batch_size: pairs in a step.
        seed, epoch: together they fix the order.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    steps: list[np.ndarray] = []
    for start in range(0, len(rows), batch_size * WINDOW_STEPS):
        window = rows[start : start + batch_size * WINDOW_STEPS]
        window = window[np.argsort(lengths[window].sum(axis=1), kind="stable")]
        steps += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [steps[i] for i in random.permutation(len(steps))]


def split_batch(batch: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut a batch's rows into micro-batches of whole pairs with at most `max_tokens` tokens, one pair at least.

    Args:
        batch: (B,) row numbers of one optimizer step.
        lengths: (N, 2) tokens of the two sides of every row.
        max_tokens: tokens that one backward pass may hold.
    """
    micro_batches: list[list[int]] = [[]]
    held = 0
    for row in batch[np.argsort(lengths[batch].max(axis=1), kind="stable")]:
        tokens = int(lengths[row].sum())
        if micro_batches[-1] and held + tokens > max_tokens:
            micro_batches.append([])
            held = 0
        micro_batches[-1].append(int(row))
        held += tokens
    return [np.array(rows) for rows in micro_batches if rows]
