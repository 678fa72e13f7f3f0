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

from prefcls_lib.data.schema import NUM_CLASSES, SWAP

WINDOW_STEPS = 8  # steps whose pairs are sorted by length together
PADDING = 128  # most tokens of padding in a padded batch; on a CPU one more batch costs about as much, as measured
PADDING_ON_GPU = 256  # an assumption: on a T4 the launch of a batch's kernels is the time of 40 to 1,000 tokens
CPU = torch.device("cpu")


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
        full_lengths: (N, 2) tokens of both sides if nothing had been cut, as `encode_rows` counts them, or None.
    """

    token_ids: Sequence[np.ndarray]
    sides: np.ndarray
    labels: np.ndarray | None = None
    offsets: np.ndarray | None = None
    tie_shifts: np.ndarray | None = None
    full_lengths: np.ndarray | None = None

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

    @property
    def cut(self) -> np.ndarray:
        """(N, 2) bool, whether a part of the side's text did not fit."""
        return self.full_lengths > self.lengths

    def take(self, chosen: np.ndarray | slice) -> "Examples":
        """Some of the rows; the sides stay as they are numbered."""
        names = ("sides", "labels", "offsets", "tie_shifts", "full_lengths")
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{name: column[chosen] for name, column in columns.items() if column is not None})

    def swapped(self, rows: np.ndarray | bool = True) -> "Examples":
        """The same rows with A and B swapped; `rows` (N,) bool: in these alone."""
        order = np.where(np.broadcast_to(rows, len(self))[:, None], SWAP, range(NUM_CLASSES))
        return replace(
            self,
            sides=np.take_along_axis(self.sides, order[:, :2], axis=1),
            labels=None if self.labels is None else order[np.arange(len(self)), self.labels],
            offsets=None if self.offsets is None else np.take_along_axis(self.offsets, order, axis=1),
            full_lengths=None,
        )

    def in_random_order(self, seed: int, epoch: int) -> "Examples":
        """What an epoch trains a cross-encoder on: one order of A and B a row, drawn anew; sides (N, 1)."""
        drawn = self.swapped(np.random.default_rng([seed, epoch, 1]).random(len(self)) < 0.5)
        return replace(drawn, sides=drawn.sides[:, :1])


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


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; to a GPU through pinned memory, so that the host does not wait for the copy."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def plan_padded_batches(
    token_ids: Sequence[np.ndarray], device: torch.device = CPU, max_sides: int = 64, max_tokens: int = 4096
) -> list[tuple[list[int], int]]:
    """Sort sides by length (equal lengths: by ids) and cut them into padded batches, longest first.

    A batch takes the next shorter side until a limit is reached, that of PADDING, too. The longest batch comes first so
    that running out of memory shows at once. The matrix units of a GPU work in tiles of 8, so lengths are rounded up
    there; what this adds is not counted as padding.

    `max_sides`, `max_tokens`: a padded batch holds no more than these, padding included, but always one side.

    Returns:
        For each padded batch the numbers of its sides, and the length that they are padded to.
    """
    multiple_of, max_padding = (8, PADDING_ON_GPU) if device.type == "cuda" else (1, PADDING)
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


def pad_batch(
    taken: list[int], length: int, token_ids: Sequence[np.ndarray], pad_id: int, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """What an encoder reads of some sides: their ids (S, T), padded with `pad_id`, and the mask of the real ones."""
    input_ids = np.full((len(taken), length), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, side in enumerate(taken):
        ids = token_ids[side]
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": to_device(input_ids, device), "attention_mask": to_device(attention_mask, device)}


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The optimizer steps of one epoch: arrays of row numbers, each row once.

    All rows are shuffled and cut into windows of WINDOW_STEPS steps; inside a window pairs are sorted by length, so
    that the pairs of a step have similar lengths; then the steps of the epoch are shuffled. Which rows share a window,
    and the order of the steps, are new in every epoch. The last step of an epoch may be shorter.

    `lengths`: (N, 2) tokens of the two sides of each row; `batch_size`: pairs in a step.
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
    """Cut a step's row numbers (B,) into micro-batches of whole pairs: at most `max_tokens` tokens, one pair at least.

    `lengths`: (N, 2) tokens of the two sides of every row.
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
