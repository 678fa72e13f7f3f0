"""Column names, label order and the swap of A and B: defined here alone."""

import numpy as np

from prefcls_lib.runtime.files import UserError

ID = "id"
PROMPT = "prompt"
RESPONSES = ("response_a", "response_b")  # in side order: side 0 = A, side 1 = B
TEXT_COLUMNS = (PROMPT, *RESPONSES)
MODEL_COLUMNS = ("model_a", "model_b")
LABEL_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")  # label 0, 1, 2
SOURCE = "source"  # of a training row: 0 of the training file, k of the k-th extra file
NUM_CLASSES = len(LABEL_COLUMNS)
SWAP = (1, 0, 2)  # the class order after A and B change places


def class_shares(labels: np.ndarray) -> np.ndarray:
    """(3,) share of each class among labels (N,): the prior."""
    return np.bincount(labels, minlength=NUM_CLASSES) / len(labels)


def check_probs(probs: np.ndarray, what: str, ends: bool = False) -> None:
    """Stop where `probs` (N, 3) are not probabilities of three classes; `what`: whose; `ends`: they may be 0 or 1."""
    inside = (probs >= 0) & (probs <= 1) if ends else (probs > 0) & (probs < 1)  # false for NaN
    good = inside.all(axis=1) & (np.abs(probs.sum(axis=1) - 1) <= 1e-6)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"{what}: row {row + 1}: {probs[row].tolist()} are not three probabilities between 0 and 1 whose sum is 1 "
            f"(rows like this: {int((~good).sum())}). Make the predictions again."
        )
