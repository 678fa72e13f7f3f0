"""The ladder: plain baselines on the same folds as the networks, every one exactly order-equivariant.

    prior               class shares
    length_bins         who is longer, and by how much: a lookup
    length_logistic     a few lengths
    structure_logistic  `features.compute_features`
    structure_boosting  the same, gradient boosted trees
    tfidf_difference    words and characters of (prompt, answer): X_a - X_b and |X_a - X_b|
    structure_tfidf     both of the above logistic models' columns

Swapping A and B must swap the probabilities. The usual way is to train on every row and its swapped copy,
then to average the predictions of both orders; the trees do that. For a logistic model with an L2 penalty the
optimum on such doubled rows is unique, so it is symmetric itself: antisymmetric columns (A minus B) can only
move A against B, symmetric ones only the tie. `_fit_logistic` therefore solves for those weights alone, on
the rows as they are: the same model (a test compares it with scikit-learn's on doubled rows), in half the
memory.

A fitted baseline is a name and a few arrays, trees included, so it is saved without pickle. The text columns are
hashed, so that no vocabulary is learned or stored: only which columns are frequent, and their IDF, from the
training fold's texts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.feature_extraction.text import HashingVectorizer

from prefcls_lib.baselines.trees import first_trees, fit_trees, predict_trees
from prefcls_lib.data.features import (
    FEATURE_NAMES,
    SIGNS,
    FeatureScaler,
    compute_features,
    empty_answers,
    identical_answers,
)
from prefcls_lib.data.schema import NUM_CLASSES, PROMPT, RESPONSES, SWAP
from prefcls_lib.evaluation.metrics import row_losses
from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

FAST_BASELINES = ("prior", "length_bins", "length_logistic", "structure_logistic")
BASELINES = (*FAST_BASELINES, "structure_boosting", "tfidf_difference", "structure_tfidf")
TEXT_BASELINES = ("tfidf_difference", "structure_tfidf")

STRENGTHS = (0.001, 0.003, 0.01)  # C of scikit-learn's LogisticRegression on rows and swapped copies
TREE_COUNTS = (25, 50, 100, 200)  # boosting steps tried, at LEARNING_RATE
TUNING_ROWS = 10_000
INNER_FOLDS = 3
LENGTH_COLUMNS = ("diff_log_chars", "diff_log_words", "diff_log_last_chars", "mean_log_chars",
                  "dist_log_chars", "log_prompt_chars", "log_turns")  # fmt: skip
LENGTH_EDGES = np.log((1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0))  # |log ratio| of the answers' characters
SHRINKAGE_ROWS = 10.0  # the base probability counts as much as so many rows
HASHED_COLUMNS = 2**18  # for words, and again for characters
MIN_TEXTS = 3  # a text column is kept if so many training answers have it
TEXT_SCALE = 8.0  # TF-IDF rows have length 1: brings their weights into the range of STRENGTHS
ORDINARY, EMPTY_A, EMPTY_B, EMPTY_BOTH, IDENTICAL = range(5)  # kinds of rows


@dataclass(frozen=True)
class BaselineInputs:
    """All that the baselines read of N rows; nothing in it is learned."""

    structure: np.ndarray  # (N, F) raw structure features
    kinds: np.ndarray  # (N,) ORDINARY ... IDENTICAL
    counts: tuple[sparse.csr_matrix, sparse.csr_matrix] | None  # (N, 2 * HASHED_COLUMNS) of sides A, B

    def take(self, index: np.ndarray) -> "BaselineInputs":
        """The rows at `index` (positions)."""
        counts = None if self.counts is None else tuple(side[index] for side in self.counts)
        return BaselineInputs(self.structure[index], self.kinds[index], counts)

    def swap(self) -> "BaselineInputs":
        """The same rows with A and B in each other's place."""
        kinds = np.array([ORDINARY, EMPTY_B, EMPTY_A, EMPTY_BOTH, IDENTICAL])[self.kinds]
        return BaselineInputs(self.structure * SIGNS, kinds, self.counts and self.counts[::-1])


def read_inputs(
    rows: pd.DataFrame, names: Sequence[str] = BASELINES, structure: np.ndarray | None = None
) -> BaselineInputs:
    """What `names` need of the rows of `data.read_rows`; texts are read only for `TEXT_BASELINES`.

    `structure`: their features where they are known already.
    """
    empty = empty_answers(rows)
    kinds = np.where(identical_answers(rows), IDENTICAL, empty @ np.array([EMPTY_A, EMPTY_B]))
    counts = None
    if set(names) & set(TEXT_BASELINES):
        prompts = ["\n".join(turns) for turns in rows[PROMPT]]
        counts = tuple(_count_ngrams(prompts, rows[name]) for name in RESPONSES)
    return BaselineInputs(compute_features(rows) if structure is None else structure, kinds, counts)


@dataclass(frozen=True)
class Baseline:
    """One fitted baseline: its name, and what it learned as plain arrays."""

    name: str
    state: dict[str, np.ndarray]

    def predict_proba(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3); those of `inputs.swap()` are the same with A and B changed, exactly."""
        if self.name == "prior":
            return np.tile(self.state["prior"], (len(inputs.kinds), 1))
        return _shrink_kinds(self.state["kind_counts"], inputs.kinds, _predict_base(self.name, self.state, inputs))


def fit_baseline(
    name: str, inputs: BaselineInputs, labels: np.ndarray, groups: np.ndarray, seed: int, strength: float | None = None
) -> Baseline:
    """Fit one baseline on training rows; labels (N,), prompt groups (N,) for the folds that choose its strength.

    `strength`: chosen already; None: chosen here.

    Raises:
        UserError: no such baseline, or a class without rows.
    """
    if name not in BASELINES:
        raise UserError(f"ladder: no baseline {name!r}. Baselines are: {', '.join(BASELINES)}.")
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    if not counts.all():
        raise UserError("ladder: a class has no training row. Give more rows or set num_folds lower.")
    if name == "prior":
        return Baseline(name, {"prior": _symmetrise(counts / counts.sum())})
    if name == "length_bins":
        state = {"bins": _fit_length_bins(inputs.structure, labels)}
    else:
        strength = choose_strength(name, inputs, labels, groups, seed) if strength is None else strength
        state = _fit_base(name, inputs, labels, strength)
    return Baseline(name, {**state, "kind_counts": _count_kinds(inputs.kinds, labels)})


def predict_rows(baselines: Sequence[Baseline], rows: pd.DataFrame) -> np.ndarray:
    """Mean probabilities (N, 3) of the same baseline fitted on several folds."""
    inputs = read_inputs(rows, [baseline.name for baseline in baselines])
    return np.mean([baseline.predict_proba(inputs) for baseline in baselines], axis=0)


def save_baseline(baseline: Baseline, folder: str | Path) -> None:
    """Write `rung.json` and `arrays.npz` into `folder`, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        write_json(temporary / "rung.json", {"rung": baseline.name, "features": FEATURE_NAMES})
        np.savez_compressed(temporary / "arrays.npz", **baseline.state)

    write_whole(folder, write)


def load_baseline(folder: str | Path) -> Baseline:
    """Read `save_baseline` back; its predictions are the same to the bit. Runs no code from the files.

    Raises:
        UserError: a file is missing or broken, or was saved for other features.
    """
    folder = Path(folder)
    saved = read_json(folder / "rung.json")
    if saved.get("rung") not in BASELINES or tuple(saved.get("features", ())) != FEATURE_NAMES:
        raise UserError(f"{folder}: not a baseline of this version of prefcls_lib. Run the ladder again.")
    try:
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return Baseline(saved["rung"], dict(arrays))
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{folder / 'arrays.npz'}: cannot be read ({error}). Run the ladder again.") from error


def _symmetrise(table: np.ndarray) -> np.ndarray:
    """Mean of class values (..., 3) and their swap, where the order of the answers means nothing."""
    return (table + table[..., list(SWAP)]) / 2


def _count_kinds(kinds: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(5, 3) labels seen with each kind of row; each row also counts as its swapped copy."""
    counts = np.zeros((5, NUM_CLASSES))
    np.add.at(counts, (kinds, labels), 1.0)
    mirrored = counts[[ORDINARY, EMPTY_B, EMPTY_A, EMPTY_BOTH, IDENTICAL]][:, list(SWAP)]
    counts = counts + mirrored
    counts[[EMPTY_BOTH, IDENTICAL]] /= 2
    counts[ORDINARY] = 0.0
    return counts


def _shrink_kinds(counts: np.ndarray, kinds: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Odd rows: (counts + m * base) / (n + m), m = SHRINKAGE_ROWS. Ordinary rows keep their `base` (N, 3)."""
    seen = counts[kinds]
    shrunk = (seen + SHRINKAGE_ROWS * base) / (seen.sum(axis=1, keepdims=True) + SHRINKAGE_ROWS)
    return np.where((kinds == ORDINARY)[:, None], base, shrunk)


def choose_strength(name: str, inputs: BaselineInputs, labels: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """The C (or the number of trees) with the lowest log loss on inner folds of at most TUNING_ROWS rows.

    Rows too few for inner folds get the strongest regularisation.
    """
    choices = TREE_COUNTS if name == "structure_boosting" else STRENGTHS
    totals = np.zeros(len(choices))
    for train, valid in _inner_splits(labels, groups, seed):
        fit_inputs, score_inputs = inputs.take(train), inputs.take(valid)
        for number, base in enumerate(_predict_path(name, choices, fit_inputs, labels[train], score_inputs)):
            totals[number] += row_losses(labels[valid], base).sum()
    return choices[int(totals.argmin())]


def _inner_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to fit and to score on, by prompt group; a split that lacks a class to learn is left out."""
    _, index = np.unique(groups, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(index.max() + 1)[index]
    used = (np.cumsum(np.bincount(rank)) <= TUNING_ROWS)[rank]
    for fold in range(INNER_FOLDS):
        train = np.flatnonzero(used & (rank % INNER_FOLDS != fold))
        valid = np.flatnonzero(used & (rank % INNER_FOLDS == fold))
        if len(valid) and len(np.unique(labels[train])) == NUM_CLASSES:
            yield train, valid


def _predict_path(
    name: str, choices: Sequence[float], inputs: BaselineInputs, labels: np.ndarray, score_inputs: BaselineInputs
) -> Iterator[np.ndarray]:
    """Probabilities of `score_inputs` for each strength; what does not depend on it is fitted once."""
    if name == "structure_boosting":
        trees = fit_trees(inputs.structure, labels, max(choices))
        for count in choices:
            yield _predict_base(name, first_trees(trees, count), score_inputs)
        return
    state = _fit_columns(name, inputs)
    columns, score_columns = _build_columns(name, state, inputs), _build_columns(name, state, score_inputs)
    for strength in choices:
        weights = _fit_logistic(*columns, labels, strength)
        yield _predict_logistic(weights, *score_columns)


def _fit_base(name: str, inputs: BaselineInputs, labels: np.ndarray, strength: float) -> dict[str, np.ndarray]:
    if name == "structure_boosting":
        return fit_trees(inputs.structure, labels, int(strength))
    state = _fit_columns(name, inputs)
    return {**state, **_fit_logistic(*_build_columns(name, state, inputs), labels, strength)}


def _predict_base(name: str, state: dict[str, np.ndarray], inputs: BaselineInputs) -> np.ndarray:
    if name == "length_bins":
        return _predict_length_bins(state["bins"], inputs.structure)
    if name == "structure_boosting":
        swapped = predict_trees(state, inputs.structure * SIGNS)[:, list(SWAP)]
        return (predict_trees(state, inputs.structure) + swapped) / 2
    return _predict_logistic(state, *_build_columns(name, state, inputs))


def _fit_length_bins(structure: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(bins, 3) probabilities that the longer answer wins, the shorter, tie; smoothed towards the prior."""
    gap = structure[:, FEATURE_NAMES.index("diff_log_chars")]
    outcome = np.eye(NUM_CLASSES)[labels]
    outcome = np.where((gap < 0)[:, None], outcome[:, list(SWAP)], outcome)
    outcome[gap == 0] = _symmetrise(outcome[gap == 0])
    counts = np.zeros((len(LENGTH_EDGES) + 1, NUM_CLASSES))
    np.add.at(counts, np.digitize(np.abs(gap), LENGTH_EDGES), outcome)
    prior = _symmetrise(np.bincount(labels, minlength=NUM_CLASSES) / len(labels))
    return (counts + SHRINKAGE_ROWS * prior) / (counts.sum(axis=1, keepdims=True) + SHRINKAGE_ROWS)


def _predict_length_bins(bins: np.ndarray, structure: np.ndarray) -> np.ndarray:
    gap = structure[:, FEATURE_NAMES.index("diff_log_chars")]
    probs = bins[np.digitize(np.abs(gap), LENGTH_EDGES)]
    probs = np.where((gap < 0)[:, None], probs[:, list(SWAP)], probs)
    return np.where((gap == 0)[:, None], _symmetrise(probs), probs)


def _count_ngrams(prompts: list[str], answers: pd.Series) -> sparse.csr_matrix:
    """(N, 2 * HASHED_COLUMNS) counts of word 1-2-grams and of characters 3-4-grams within words."""
    texts = [prompt + "\n" + "\n".join(turns) for prompt, turns in zip(prompts, answers, strict=True)]
    plain = {"n_features": HASHED_COLUMNS, "norm": None, "alternate_sign": False, "dtype": np.float32}
    words = HashingVectorizer(analyzer="word", ngram_range=(1, 2), token_pattern=r"\b\w+\b", **plain)
    characters = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **plain)
    return sparse.hstack([words.transform(texts), characters.transform(texts)], format="csr")


def _fit_columns(name: str, inputs: BaselineInputs) -> dict[str, np.ndarray]:
    """Standardisation and IDF of the columns of a logistic baseline."""
    state = {}
    if name != "tfidf_difference":
        scaler = FeatureScaler.fit(inputs.structure)
        state = {"center": scaler.center, "scale": scaler.scale}
    if name in TEXT_BASELINES:
        texts = sum(np.bincount(side.indices, minlength=side.shape[1]) for side in inputs.counts)
        kept = np.flatnonzero(texts >= MIN_TEXTS)
        idf = 1 + np.log((1 + 2 * len(inputs.kinds)) / (1 + texts[kept]))
        state |= {"kept": kept.astype(np.int32), "idf": idf.astype(np.float32)}
    return state


def _build_columns(name: str, state: dict[str, np.ndarray], inputs: BaselineInputs) -> tuple:
    """Antisymmetric columns (N, Fa) and symmetric columns (N, Fs): dense, or float32 CSR with text."""
    if name != "tfidf_difference":
        structure = FeatureScaler(state["center"], state["scale"]).transform(inputs.structure)
        used = np.isin(FEATURE_NAMES, LENGTH_COLUMNS) if name == "length_logistic" else np.full(len(SIGNS), True)
        columns = structure[:, used & (SIGNS < 0)], structure[:, used & (SIGNS > 0)]
        if name not in TEXT_BASELINES:
            return columns
    difference = _weigh_side(inputs.counts[0], state) - _weigh_side(inputs.counts[1], state)
    distance = sparse.csr_matrix((np.abs(difference.data), difference.indices, difference.indptr), difference.shape)
    if name == "tfidf_difference":
        return difference, distance
    columns = [sparse.csr_matrix(block, dtype=np.float32) for block in columns]
    return tuple(sparse.hstack(pair, format="csr") for pair in zip(columns, (difference, distance), strict=True))


def _weigh_side(counts: sparse.csr_matrix, state: dict[str, np.ndarray]) -> sparse.csr_matrix:
    """TF-IDF (N, kept) of one side, sublinear in the counts, rows of length TEXT_SCALE."""
    weighted = counts[:, state["kept"]]
    weighted.data = (1 + np.log(weighted.data)) * state["idf"][weighted.indices]
    squares = sparse.csr_matrix((weighted.data**2, weighted.indices, weighted.indptr), weighted.shape)
    length = np.sqrt(squares @ np.ones(weighted.shape[1], dtype=np.float32))
    scale = np.float32(TEXT_SCALE) / np.where(length > 0, length, np.float32(1))
    weighted.data *= np.repeat(scale, np.diff(weighted.indptr))
    return weighted


def _fit_logistic(anti, sym, labels: np.ndarray, strength: float) -> dict[str, np.ndarray]:
    """Weights of logits (anti @ w, -anti @ w, sym @ v + b) with the lowest penalised loss.

    Equal to scikit-learn's LogisticRegression(C=strength) on [anti, sym] with every row's swapped copy
    [-anti, sym] added. There w stands in the rows of A and, negated, of B, and v is shared out as -v/3, -v/3,
    2v/3: the penalty |W|^2 / 2 is |w|^2 + |v|^2 / 3.
    """
    width, dtype = anti.shape[1], anti.dtype
    one_hot = np.eye(NUM_CLASSES)[labels]
    scale = 1 / (2 * strength * len(labels))

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, v, b = parameters[:width], parameters[width:-1], parameters[-1]
        state = {"w": w.astype(dtype), "v": v.astype(dtype), "b": b}
        probs = _predict_logistic(state, anti, sym)
        error = (probs - one_hot) / len(labels)
        loss = row_losses(labels, probs).mean() + scale * (w @ w + v @ v / 3)
        down_w = anti.T @ (error[:, 0] - error[:, 1]).astype(dtype)
        down_v = sym.T @ error[:, 2].astype(dtype)
        return loss, np.concatenate([down_w + 2 * scale * w, down_v + 2 / 3 * scale * v, [error[:, 2].sum()]])

    start = np.zeros(width + sym.shape[1] + 1)
    options = {"maxiter": 300, "gtol": 1e-6, "ftol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return {"w": found[:width].astype(dtype), "v": found[width:-1].astype(dtype), "b": found[-1:]}


def _predict_logistic(state: dict[str, np.ndarray], anti, sym) -> np.ndarray:
    verdict = (anti @ state["w"]).astype(np.float64)
    tie = (sym @ state["v"]).astype(np.float64) + state["b"]
    return softmax(np.column_stack([verdict, -verdict, tie]), axis=1)
