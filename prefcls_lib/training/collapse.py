"""The collapse check: does the encoder contribute anything, though the network around it works?"""

from collections.abc import Callable

import numpy as np
from scipy.special import softmax

from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import class_shares
from prefcls_lib.evaluation import scores

COLLAPSED_SPREAD = 0.01  # a healthy encoder's predictions differ by more than this from row to row
COLLAPSE_AFTER_ROWS = 10_000  # training rows before an encoder may count as collapsed: DeBERTa-v3 needs them to move
USEFUL_GAIN = 0.001  # log loss below a baseline's that is more than rounding


class Collapsed(Exception):
    """The encoder contributes nothing. `record` is the validation that showed it."""

    def __init__(self, message: str, record: dict):
        super().__init__(message)
        self.record = record


def reference_log_losses(train: Examples, valid: Examples) -> tuple[float, float | None]:
    """On the validation rows: of the class shares in training, and of the baseline that the network starts from."""
    prior = scores.log_loss(valid.labels, np.tile(class_shares(train.labels[train.own]), (len(valid), 1)))
    if valid.offsets is None:
        return prior, None
    return prior, scores.log_loss(valid.labels, softmax(valid.offsets.astype(float), axis=1))


def why_collapsed(record: dict, prior_log_loss: float, baseline_log_loss: float | None) -> str:
    """Why the encoder counts as collapsed, "" where it may be healthy.

    Collapsed is one whose predictions, features at their mean, are the same for every row; and one that adds nothing:
    not better than the prior by itself, while the whole network is not better than the baseline that it starts from
    (None: it starts from none).
    """
    spread, alone, whole = record["encoder_spread"], record["encoder_log_loss"], record["valid_log_loss"]
    if spread < COLLAPSED_SPREAD:
        why = f"with the structure features at their mean its predictions differ by {spread:.4f} from row to row"
        return f"{why}, which is less than {COLLAPSED_SPREAD}"
    if baseline_log_loss is None or max(prior_log_loss - alone, baseline_log_loss - whole) > USEFUL_GAIN:
        return ""
    return (
        f"by itself its log loss is {alone:.4f} (the prior's {prior_log_loss:.4f}), and the network's is {whole:.4f} "
        f"(its baseline's {baseline_log_loss:.4f}); at least one must be better by more than {USEFUL_GAIN}"
    )


def check_encoder(
    record: dict, rows_seen: int, references: tuple[float, float | None], on_collapse: str, log: Callable[[str], None]
) -> None:
    """Log an encoder that contributes nothing; note in `record` whether it counts as collapsed.

    Raises:
        Collapsed: it does, and `on_collapse` is not "warn".
    """
    reason = why_collapsed(record, *references)
    record["collapsed"] = bool(reason) and rows_seen >= COLLAPSE_AFTER_ROWS
    if not reason:
        return
    state = "has collapsed" if record["collapsed"] else "does not contribute yet"
    message = f"the encoder {state} after {rows_seen:,} rows: {reason}"
    log(message)
    if record["collapsed"] and on_collapse != "warn":
        raise Collapsed(message, record)
