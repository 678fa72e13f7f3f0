"""What the baselines read of rows: structure features, special kinds of rows, and the answers' words, hashed.

The words are hashed, so that no vocabulary is learned or stored: only their IDF, from the training texts.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from prefcls_lib.data.features import SIGNS, Text, compute_features, empty_answers, identical_answers
from prefcls_lib.data.schema import NUM_CLASSES, PROMPT, RESPONSES, SOURCE, SWAP

HASHED_COLUMNS = 2**15
MIN_TEXTS = 3  # a text column counts if so many training answers have it
TEXT_SCALE = 8.0  # length of a row of TF-IDF: with it the same strengths suit words and features
ROWS_AT_ONCE = 4096  # in reading and predicting: bounds the memory for intermediate results
CLIP = 4.0  # standard deviations: limit of a feature, so that one very long answer does not dominate a fit
ORDINARY, EMPTY_A, EMPTY_B, EMPTY_BOTH, IDENTICAL = range(5)  # kinds of rows
SHRINKAGE_ROWS = 10.0  # the base probability counts as much as so many rows


@dataclass(frozen=True)
class BaselineInputs:
    """All that the baselines read of N rows; nothing in it is learned."""

    dense: np.ndarray  # (N, F) raw structure features, `features.FEATURE_NAMES`
    kinds: np.ndarray  # (N,) ORDINARY ... IDENTICAL
    counts: tuple[sparse.csr_matrix, sparse.csr_matrix] | None  # (N, HASHED_COLUMNS) words of sides A, B
    sources: np.ndarray  # (N,) `schema.SOURCE`; 0 of other rows than training rows

    def take(self, index: np.ndarray) -> "BaselineInputs":
        """The rows at `index` (positions)."""
        counts = None if self.counts is None else tuple(side[index] for side in self.counts)
        return BaselineInputs(self.dense[index], self.kinds[index], counts, self.sources[index])


def read_inputs(rows: pd.DataFrame, with_text: bool = True) -> BaselineInputs:
    """What the baselines read of rows of `loading.read_rows`; with `with_text` also words, which some of them need."""
    from sklearn.feature_extraction import FeatureHasher  # late, as in `trees.fit_trees`

    kinds = np.where(identical_answers(rows), IDENTICAL, empty_answers(rows) @ np.array([EMPTY_A, EMPTY_B]))
    hasher = FeatureHasher(HASHED_COLUMNS, input_type="string", alternate_sign=False, dtype=np.float32)
    dense, counts = [], [[sparse.csr_matrix((0, HASHED_COLUMNS), dtype=np.float32)] for _ in RESPONSES]
    for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
        block = rows.iloc[start : start + ROWS_AT_ONCE]
        prompts, *answers = (list(map(Text, block[name])) for name in (PROMPT, *RESPONSES))
        dense.append(compute_features(prompts, *answers))
        for of_side, side in zip(counts, answers if with_text else [], strict=with_text):
            of_side.append(hasher.transform(answer.words for answer in side))
    sides = tuple(sparse.vstack(side, format="csr") for side in counts) if with_text else None
    sources = rows[SOURCE].to_numpy() if SOURCE in rows else np.zeros(len(rows), dtype=np.int64)
    return BaselineInputs(np.concatenate(dense), kinds, sides, sources)


def fit_dense(dense: np.ndarray) -> dict[str, np.ndarray]:
    """Standardisation of raw features (N, F): by mean and standard deviation, antisymmetric ones by the latter alone.

    Around zero instead of their mean, so that a swap of the answers changes their sign exactly.
    """
    center = np.where(SIGNS > 0, dense.mean(axis=0), 0.0)
    scale = np.sqrt(((dense - center) ** 2).mean(axis=0))
    return {"center": center, "scale": np.where(scale > 1e-8, scale, 1.0)}


def fit_text(counts: tuple[sparse.csr_matrix, sparse.csr_matrix]) -> dict[str, np.ndarray]:
    """The text columns that are frequent, and their IDF, of both sides' counts (N, C)."""
    texts = sum(np.bincount(side.indices, minlength=side.shape[1]) for side in counts)
    kept = np.flatnonzero(texts >= MIN_TEXTS)
    idf = 1 + np.log((1 + 2 * counts[0].shape[0]) / (1 + texts[kept]))
    return {"kept": kept.astype(np.int32), "idf": idf.astype(np.float32)}


def make_columns(state: dict[str, np.ndarray], inputs: BaselineInputs) -> tuple[tuple, tuple]:
    """Blocks of antisymmetric and of symmetric columns: features, clipped to +-CLIP, and words if `state` has IDF."""
    dense = np.clip((inputs.dense - state["center"]) / state["scale"], -CLIP, CLIP)
    words = [(block,) for block in text_columns(state, inputs.counts)] if "idf" in state else [(), ()]
    return (dense[:, SIGNS < 0], *words[0]), (dense[:, SIGNS > 0], *words[1])


def text_columns(state: dict[str, np.ndarray], counts: tuple) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """TF-IDF of A minus that of B, and the distance of the two, (N, kept) float32 each."""
    difference = _weigh_side(counts[0], state) - _weigh_side(counts[1], state)
    distance = sparse.csr_matrix((np.abs(difference.data), difference.indices, difference.indptr), difference.shape)
    return difference, distance


def _weigh_side(counts: sparse.csr_matrix, state: dict[str, np.ndarray]) -> sparse.csr_matrix:
    """TF-IDF (N, kept) of one side, sublinear in the counts, rows of length TEXT_SCALE."""
    weighted = counts[:, state["kept"]]
    weighted.data = (1 + np.log(weighted.data)) * state["idf"][weighted.indices]
    squares = sparse.csr_matrix((weighted.data**2, weighted.indices, weighted.indptr), weighted.shape)
    length = np.sqrt(squares @ np.ones(weighted.shape[1], dtype=np.float32))
    scale = np.float32(TEXT_SCALE) / np.where(length > 0, length, np.float32(1))
    weighted.data *= np.repeat(scale, np.diff(weighted.indptr))
    return weighted


def tie_shifts(sources: np.ndarray, of_files: np.ndarray) -> np.ndarray:
    """(N,) what is added to the log-odds of a tie in the loss of rows: 0, or that of the row's extra file."""
    return np.append(0.0, of_files)[sources]


def tie_shares_shift(labels: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(K,) log-odds of a tie in each extra file minus those in the training file; each with half a row added."""
    ties, rows = np.bincount(sources, labels == NUM_CLASSES - 1), np.bincount(sources)
    log_odds = np.log((ties + 0.5) / (rows - ties + 0.5))
    return log_odds[1:] - log_odds[0]


def tie_weights(labels: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(N,) weights that give each extra file the training file's share of ties; 1 without extra rows.

    For models that have no tie logit of a row: tables and trees. Rows of a file without ties weigh 0.
    """
    is_tie, weights = labels == NUM_CLASSES - 1, np.ones(len(labels))
    share = is_tie[sources == 0].mean()
    for source in range(1, sources.max() + 1):
        here = sources == source
        own = is_tie[here].mean() if here.any() else 0.0
        weights[here] = np.where(is_tie[here], share / own, (1 - share) / (1 - own)) if 0 < own < 1 else 0.0
    return weights


def count_kinds(kinds: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(5, 3) labels seen with each kind of row, of `weights` (N,); each row also counts as its swapped copy."""
    counts = np.zeros((5, NUM_CLASSES))
    np.add.at(counts, (kinds, labels), weights)
    mirrored = counts[[ORDINARY, EMPTY_B, EMPTY_A, EMPTY_BOTH, IDENTICAL]][:, list(SWAP)]
    counts = counts + mirrored
    counts[[EMPTY_BOTH, IDENTICAL]] /= 2
    counts[ORDINARY] = 0.0
    return counts


def shrink(counts: np.ndarray, base: np.ndarray) -> np.ndarray:
    """(counts + m * base) / (n + m) of counts (N, 3) with sums n, m = SHRINKAGE_ROWS."""
    return (counts + SHRINKAGE_ROWS * base) / (counts.sum(axis=1, keepdims=True) + SHRINKAGE_ROWS)


def shrink_kinds(counts: np.ndarray, kinds: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Probabilities (N, 3): of special kinds from `count_kinds`, see `shrink`; ordinary rows keep `base` (N, 3)."""
    return np.where((kinds == ORDINARY)[:, None], base, shrink(counts[kinds], base))
