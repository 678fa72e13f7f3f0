import json

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from prefcls_lib.baselines import columns, cross_validation, estimators, logistic, trees
from prefcls_lib.data import loading, splits
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS
from prefcls_lib.data.schema import RESPONSES, SWAP
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.runtime.files import UserError

SWAPPED = list(SWAP)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """200 of the shipped rows, odd ones among them."""
    rows = splits.take_rows(loading.read_rows(loading.sample_path("train"), labelled=True), 200, seed=0)
    a, b = (rows.columns.get_loc(name) for name in RESPONSES)
    for number in range(12):
        turns = rows.iat[number, a]
        if number < 4:
            rows.iat[number, b] = list(turns)  # identical answers
        else:
            rows.iat[number, b if number % 2 else a] = [""] * len(turns)  # one answer empty
    return rows


@pytest.fixture(scope="module")
def swapped_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.rename(columns=dict(zip(RESPONSES, RESPONSES[::-1], strict=True)))


@pytest.fixture(scope="module")
def results(rows: pd.DataFrame) -> dict:
    """Every baseline, two folds of three."""
    folds = splits.assign_folds(rows, 3, seed=1)
    return cross_validation.cross_validate(estimators.BASELINES, rows, folds, (0, 2), seed=1, progress=False)


@pytest.mark.parametrize("name", estimators.BASELINES)
def test_swapping_the_answers_swaps_the_probabilities(name, rows, swapped_rows, results):
    """Every baseline is order-equivariant to the last bits, odd rows included, and gives real probabilities."""
    baseline = results[name].baselines[0]
    probs = baseline.predict_proba(columns.read_inputs(rows, [name]))
    swapped = baseline.predict_proba(columns.read_inputs(swapped_rows, [name]))
    np.testing.assert_allclose(swapped[:, SWAPPED], probs, rtol=0, atol=1e-12)
    scores.check_probs(probs, name)


@pytest.mark.parametrize("name", estimators.BASELINES)
def test_training_on_swapped_rows_learns_the_same_baseline(name, rows, swapped_rows):
    """A fit sees every row in both orders, so a data set with A and B exchanged teaches it the same."""
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    inputs = columns.read_inputs(rows, [name])
    one = estimators.fit_baseline(name, inputs, labels, groups, seed=2)
    other = estimators.fit_baseline(
        name, columns.read_inputs(swapped_rows, [name]), np.array(SWAP)[labels], groups, seed=2
    )
    np.testing.assert_allclose(other.predict_proba(inputs), one.predict_proba(inputs), rtol=0, atol=2e-3)


def test_the_ensemble_is_the_geometric_mean_of_its_members(rows, results):
    """p proportional to the root of the product, for the fits of the ladder and for a fit of the ensemble alone."""
    product = results["structure_tfidf"].probs * results["structure_boosting"].probs
    expected = np.sqrt(product) / np.sqrt(product).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(results[estimators.ENSEMBLE].probs, expected, rtol=0, atol=1e-12)
    assert [one.name for one in results[estimators.ENSEMBLE].baselines[0].members] == list(estimators.MEMBERS)
    assert results["prior"].baselines[0].members == (results["prior"].baselines[0],)
    folds = splits.assign_folds(rows, 3, seed=1)
    alone = cross_validation.cross_validate([estimators.ENSEMBLE], rows, folds, (0, 2), seed=1, progress=False)
    assert alone[estimators.ENSEMBLE].probs.tobytes() == results[estimators.ENSEMBLE].probs.tobytes()


def test_the_ladder_fits_the_members_of_the_ensemble_once(rows, monkeypatch):
    """Where they are baselines of the same ladder, the ensemble takes their fits."""
    fitted = []
    fit = cross_validation.fit_baseline
    monkeypatch.setattr(cross_validation, "fit_baseline", lambda name, *rest: fitted.append(name) or fit(name, *rest))
    names, folds = (*estimators.MEMBERS, estimators.ENSEMBLE), splits.assign_folds(rows, 3, seed=1)
    cross_validation.cross_validate(names, rows, folds, (0,), seed=1, progress=False)
    assert fitted == list(estimators.MEMBERS)


@pytest.mark.parametrize("name", estimators.BASELINES)
def test_a_saved_baseline_predicts_the_same_bytes(name, rows, results, tmp_path):
    """What is on disk is the model, bit for bit, and overwrites an older one."""
    baseline = results[name].baselines[1]
    estimators.save_baseline(results["prior"].baselines[0], tmp_path / "rung")
    estimators.save_baseline(baseline, tmp_path / "rung")
    loaded = estimators.load_baseline(tmp_path / "rung")
    inputs = columns.read_inputs(rows, [name])
    assert loaded.name == name
    assert loaded.predict_proba(inputs).tobytes() == baseline.predict_proba(inputs).tobytes()


def test_loading_runs_no_code_and_refuses_what_is_not_a_baseline(tmp_path, results):
    """Pickled objects in the arrays, other features and missing files stop with one message."""
    estimators.save_baseline(results["prior"].baselines[0], tmp_path / "rung")
    (tmp_path / "rung" / "arrays.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"arrays\.safetensors: cannot be read"):
        estimators.load_baseline(tmp_path / "rung")
    (tmp_path / "rung" / "arrays.safetensors").unlink()
    np.savez(tmp_path / "rung" / "arrays.npz", prior=np.array([print], dtype=object))
    with pytest.raises(UserError, match=r"arrays\.npz: cannot be read"):
        estimators.load_baseline(tmp_path / "rung")
    (tmp_path / "rung" / "rung.json").write_text(json.dumps({"rung": "prior", "features": ["other"]}))
    with pytest.raises(UserError, match="not a baseline of this version"):
        estimators.load_baseline(tmp_path / "rung")
    with pytest.raises(UserError, match="no such file"):
        estimators.load_baseline(tmp_path / "nothing")


def test_the_logistic_model_is_that_of_scikit_learn_on_rows_and_swapped_copies():
    """The same probabilities two ways: symmetric weights on the rows, sklearn's free ones on doubled rows."""
    generator = np.random.default_rng(3)
    anti, sym = generator.standard_normal((200, 4)), generator.standard_normal((200, 3))
    labels = generator.integers(0, 3, 200)
    labels = np.where(anti[:, 0] > 0.3, 0, labels)
    doubled = np.vstack([np.hstack([anti, sym]), np.hstack([-anti, sym])])
    model = LogisticRegression(C=0.02, solver="newton-cg", tol=1e-10)
    model.fit(doubled, np.concatenate([labels, np.array(SWAP)[labels]]))
    weights = logistic.fit_logistic(anti, sym, labels, strength=0.02)
    ours = logistic.predict_logistic(weights, anti, sym)
    np.testing.assert_allclose(ours, model.predict_proba(doubled[:200]), atol=2e-4)
    thin = (sparse.csr_matrix(anti.astype(np.float32)), sparse.csr_matrix(sym.astype(np.float32)))
    np.testing.assert_allclose(
        logistic.predict_logistic(logistic.fit_logistic(*thin, labels, 0.02), *thin), ours, atol=1e-3
    )


def test_the_stored_trees_predict_what_scikit_learn_predicts(monkeypatch):
    """Our arrays are scikit-learn's trees: the same probabilities on rows that the fit never saw."""
    models = []

    class Kept(HistGradientBoostingClassifier):
        def fit(self, *args):
            models.append(self)
            return super().fit(*args)

    monkeypatch.setattr(trees, "HistGradientBoostingClassifier", Kept)
    generator = np.random.default_rng(4)
    structure, unseen = generator.standard_normal((2, 300, len(SIGNS)))
    labels = np.where(structure[:, 0] > 0.5, 0, generator.integers(0, 3, 300))
    fitted = trees.fit_trees(structure, labels, num_steps=12)
    np.testing.assert_allclose(trees.predict_trees(fitted, unseen), models[0].predict_proba(unseen), rtol=0, atol=1e-12)
    fewer = trees.predict_trees(trees.first_trees(fitted, 5), unseen)
    np.testing.assert_allclose(fewer, list(models[0].staged_predict_proba(unseen))[4], rtol=0, atol=1e-12)


def test_trees_do_not_depend_on_the_last_bits_of_the_features():
    """Another processor's logarithm differs in the last bits: the same trees to the bit, and the same predictions."""
    generator = np.random.default_rng(8)
    structure = np.log1p(generator.integers(0, 60, (300, len(SIGNS)))) - np.log1p(generator.integers(0, 60, (300, 1)))
    labels = np.where(structure[:, 0] > 0.5, 0, generator.integers(0, 3, 300))
    other = structure + generator.choice([-4e-16, 0, 4e-16], structure.shape)
    one, two = trees.fit_trees(structure, labels, num_steps=8), trees.fit_trees(other, labels, num_steps=8)
    assert all((one[name] == two[name]).all() for name in one)
    assert (trees.predict_trees(one, structure) == trees.predict_trees(two, other)).all()


def test_length_bins_by_hand():
    """Two rows of ratio about 2, the longer wins once and ties once, and 10 rows of prior (1/4, 1/4, 1/2)."""
    structure = np.zeros((4, len(SIGNS)))
    structure[:, FEATURE_NAMES.index("diff_log_chars")] = [0.8, -0.8, 0.0, 0.0]
    bins = estimators._fit_length_bins(structure, np.array([0, 2, 1, 2]))
    here = int(np.digitize(0.8, estimators.LENGTH_EDGES))
    assert bins[here] == pytest.approx(np.array([1 + 2.5, 0 + 2.5, 1 + 5]) / 12)
    assert bins[0] == pytest.approx(np.array([0.5 + 2.5, 0.5 + 2.5, 1 + 5]) / 12)
    assert bins[3] == pytest.approx([0.25, 0.25, 0.5])
    probs = estimators._predict_length_bins(bins, structure)
    assert probs[0] == pytest.approx(bins[here]) and probs[1] == pytest.approx(bins[here][SWAPPED])


def test_odd_rows_are_shrunk_from_training_counts_by_hand():
    """Identical answers tied 3 times of 4; the empty side lost 2 of 2, once as A and once as B."""
    kinds = np.array([columns.IDENTICAL] * 4 + [columns.EMPTY_A, columns.EMPTY_B, columns.ORDINARY])
    counts = columns.count_kinds(kinds, np.array([2, 2, 2, 0, 1, 0, 1]))
    assert counts[columns.IDENTICAL].tolist() == [0.5, 0.5, 3.0]
    assert counts[columns.EMPTY_A].tolist() == [0.0, 2.0, 0.0]
    base = np.array([[0.4, 0.4, 0.2], [0.3, 0.5, 0.2], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    asked = np.array([columns.IDENTICAL, columns.EMPTY_A, columns.EMPTY_B, columns.EMPTY_BOTH, columns.ORDINARY])
    probs = columns.shrink_kinds(counts, asked, base)
    assert probs[0] == pytest.approx(np.array([0.5 + 4, 0.5 + 4, 3 + 2]) / 14)
    assert probs[1] == pytest.approx(np.array([3, 2 + 5, 2]) / 12)
    assert probs[2] == pytest.approx(np.array([2 + 3, 5, 2]) / 12)
    assert (probs[3:] == base[3:]).all()


def test_kinds_of_rows_are_read_from_the_texts(rows):
    """The fixture's first rows: four identical pairs, then B and A empty by turns."""
    kinds = columns.read_inputs(rows, ["prior"]).kinds
    assert (kinds[:4] == columns.IDENTICAL).all()
    assert (kinds[4:12:2] == columns.EMPTY_A).all() and (kinds[5:12:2] == columns.EMPTY_B).all()


def test_tf_idf_is_learned_from_training_texts_only():
    """Columns and IDF follow the fitted rows alone: a column that only other rows have is not kept."""
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [3, 0, 0], [1, 4, 0], [0, 5, 0]], dtype=np.float32))
    inputs = columns.BaselineInputs(np.zeros((4, len(SIGNS))), np.zeros(4, dtype=int), (counts, counts))
    state = columns.fit_columns("tfidf_difference", inputs.take(np.array([0, 1])))
    assert state["kept"].tolist() == [0]
    assert state["idf"] == pytest.approx([1 + np.log(5 / 5)])
    every = columns.fit_columns("tfidf_difference", inputs)
    assert every["kept"].tolist() == [0, 1] and every["idf"] == pytest.approx([1 + np.log(9 / 7), 1 + np.log(9 / 5)])


def test_sides_are_weighed_sublinearly_to_one_length():
    """Counts (1, e) with equal IDF weigh 1 to 2 and have length TEXT_SCALE; an empty side stays zero."""
    counts = sparse.csr_matrix(np.array([[1, np.e], [0, 0]], dtype=np.float32))
    state = {"kept": np.array([0, 1]), "idf": np.ones(2, dtype=np.float32)}
    weighed = columns._weigh_side(counts, state).toarray()
    assert weighed[0] == pytest.approx(columns.TEXT_SCALE * np.array([1, 2]) / np.sqrt(5), rel=1e-6)
    assert (weighed[1] == 0).all()


def test_out_of_sample_rows_are_those_of_the_run_folds(rows, results):
    """Rows of folds 0 and 2 are predicted, the others NaN, and each fold by its own model."""
    folds = splits.assign_folds(rows, 3, seed=1)
    for result in results.values():
        assert (np.isfinite(result.probs).all(axis=1) == np.isin(folds, (0, 2))).all()
        assert len(result.baselines) == 2 and result.seconds >= 0
    inputs = columns.read_inputs(rows, estimators.FAST_BASELINES)
    for number, fold in enumerate((0, 2)):
        again = results["structure_logistic"].baselines[number].predict_proba(inputs)
        np.testing.assert_allclose(
            again[folds == fold], results["structure_logistic"].probs[folds == fold], rtol=0, atol=1e-12
        )


def test_labels_of_the_predicted_fold_change_nothing(rows, results):
    """A planted leak test: other labels in fold 0 leave the predictions of fold 0 as they were."""
    folds = splits.assign_folds(rows, 3, seed=1)
    labels = rows["label"].to_numpy()
    changed = rows.assign(label=np.where(folds == 0, (labels + 1) % 3, labels))
    again = cross_validation.cross_validate(estimators.FAST_BASELINES, changed, folds, (0,), seed=1, progress=False)
    for name in estimators.FAST_BASELINES:
        assert (again[name].probs[folds == 0] == results[name].probs[folds == 0]).all()


def test_a_prompt_group_in_two_folds_is_refused(rows):
    """A planted leak: one group split between folds stops before anything is fitted."""
    rows = rows.assign(group=["same" if number < 2 else group for number, group in enumerate(rows["group"])])
    folds = np.arange(len(rows)) % 3
    folds[:2] = 0, 1
    with pytest.raises(UserError, match=r"prompt group same is in folds 0 and 1"):
        cross_validation.cross_validate(["prior"], rows, folds, (0,), seed=0, progress=False)


@pytest.mark.parametrize(("run_fold", "message"), [(7, "fold 7 has no rows"), (1, "fold 1 has rows of one class")])
def test_folds_that_cannot_be_scored_are_refused(rows, run_fold, message):
    """A fold without rows, or with one class only, stops with one message."""
    groups = [str(number) for number in range(len(rows))]
    folds = np.where(rows["label"] == 2, 1, 0)
    with pytest.raises(UserError, match=message):
        cross_validation.cross_validate(
            ["prior"], rows.assign(group=groups), folds, (run_fold,), seed=0, progress=False
        )


def test_unknown_baselines_and_missing_classes_are_refused(rows):
    """A mistyped baseline lists the right ones; a class without training rows cannot be learned."""
    inputs, labels = columns.read_inputs(rows, ["prior"]), rows["label"].to_numpy()
    groups = rows["group"].to_numpy()
    with pytest.raises(UserError, match=r"no baseline 'lenght_bins'.*length_bins"):
        estimators.fit_baseline("lenght_bins", inputs, labels, groups, seed=0)
    with pytest.raises(UserError, match="class has no training row"):
        estimators.fit_baseline("prior", inputs, np.zeros_like(labels), groups, seed=0)


def test_every_baseline_learns_that_the_longer_answer_wins():
    """On rows where length alone decides, all baselines above the prior beat it clearly."""
    generator = np.random.default_rng(5)
    words = ["red", "green", "blue", "stone", "river", "cloud", "seven", "apple"]
    lines = []
    for number in range(240):
        lengths = generator.choice([5, 40], size=2, replace=False)
        a, b = (" ".join(generator.choice(words, size)) for size in lengths)
        label = 2 if number % 4 == 0 else int(lengths[1] > lengths[0])
        lines.append((str(number), [f"prompt {number}"], [a], [b], label, str(number)))
    rows = pd.DataFrame(lines, columns=["id", "prompt", *RESPONSES, "label", "group"])
    folds = splits.assign_folds(rows, 3, seed=0)
    results = cross_validation.cross_validate(estimators.BASELINES, rows, folds, (0,), seed=0, progress=False)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    table = cross_validation.ladder_table(results, labels, groups).set_index("rung")
    assert (table.loc[list(estimators.BASELINES[1:]), "log_loss"] < table.loc["prior", "log_loss"] - 0.2).all()
    assert list(table.columns) == ["log_loss", "low", "high", "accuracy", "seconds"]


def test_the_pair_of_a_fold_is_chosen_on_other_folds_by_hand():
    """Five baselines on two folds of two rows, all labels A: on fold 0 the best are w and x, on fold 1 y and z. So fold
    0 is predicted by the geometric mean of y and z, fold 1 by that of w and x; with other labels in it, still."""
    p = {"w": (0.8, 0.3), "x": (0.7, 0.2), "y": (0.4, 0.9), "z": (0.3, 0.6)}  # of class A, on fold 0 and fold 1
    p[estimators.ENSEMBLE] = (0.35, 0.5)  # two rows of a fold lose the same, so that the standard error is 0
    folds, groups = np.array([0, 0, 1, 1]), np.array(list("abcd"))
    probs = {name: np.array([[v[f], (1 - v[f]) / 2, (1 - v[f]) / 2] for f in folds]) for name, v in p.items()}
    results = {name: cross_validation.OutOfSample(value, (), 0.0) for name, value in probs.items()}
    names, cross_fitted, naive = cross_validation.choose_entry(results, np.zeros(4, dtype=int), groups, folds)

    def mean(one: float, other: float) -> float:
        rest = np.sqrt((1 - one) * (1 - other)) / 2
        return np.sqrt(one * other) / (np.sqrt(one * other) + 2 * rest)

    assert cross_fitted[:, 0] == pytest.approx([mean(0.4, 0.3)] * 2 + [mean(0.3, 0.2)] * 2)
    assert names == ["y", "w"] and naive[:, 0] == pytest.approx([mean(0.4, 0.8)] * 2 + [mean(0.9, 0.3)] * 2)
    changed = cross_validation.choose_entry(results, np.array([1, 1, 0, 0]), groups, folds)[1]
    assert (changed[:2] == cross_fitted[:2]).all() and (changed[2:] != cross_fitted[2:]).all()


@pytest.mark.parametrize(("second", "expected"), [(0.6, "pair"), (0.3, "ensemble")])
def test_two_baselines_need_one_standard_error_more_than_the_ensemble(second, expected):
    """On two rows of two prompts the pair gives class A .9 and .6, the ensemble .5: gains of log 1.8 and log 1.2, whose
    mean .385 is above their standard error .143. With .3 in place of .6 they are log 1.8 and log .6: .038 and .389."""
    of_a = {"w": [0.9, second, 0.7, 0.7], "x": [0.9, second, 0.7, 0.7], estimators.ENSEMBLE: [0.5, 0.5, 0.4, 0.4]}
    folds, groups = np.array([0, 0, 1, 1]), np.array(list("abcd"))
    probs = {name: np.array([[p, (1 - p) / 2, (1 - p) / 2] for p in values]) for name, values in of_a.items()}
    results = {name: cross_validation.OutOfSample(value, (), 0.0) for name, value in probs.items()}
    entry = cross_validation.choose_entry(results, np.zeros(4, dtype=int), groups, folds)[1]
    assert entry[2:, 0] == pytest.approx([0.7, 0.7] if expected == "pair" else [0.4, 0.4])
    assert entry[:2, 0] == pytest.approx([0.9, second])  # on the other fold the pair is better on both rows


def test_standard_error_counts_prompts_not_rows():
    """Values 1, 3, 2, 2 with mean 2: deviations -1, 1, 0, 0, so sqrt(2) / 4; if the first two share a prompt, they sum
    to 0; if the first and the third do, nothing changes, and two copies of each row say no more than one."""
    values = np.array([1.0, 3.0, 2.0, 2.0])
    assert compare.standard_error(values, np.arange(4)) == pytest.approx(np.sqrt(2) / 4)
    assert compare.standard_error(values, np.array([0, 0, 1, 2])) == 0
    assert compare.standard_error(values, np.array([0, 1, 0, 2])) == pytest.approx(np.sqrt(2) / 4)
    twice = compare.standard_error(np.repeat(values, 2), np.repeat(np.arange(4), 2))
    assert twice == pytest.approx(np.sqrt(2) / 4)


def test_one_fold_is_predicted_by_pairs_that_other_prompts_chose():
    """Other labels in one half of the prompts leave its predictions as they were and change the other half's."""
    generator = np.random.default_rng(7)
    groups, labels = np.arange(60).astype(str), generator.integers(0, 3, 60)
    results = {name: cross_validation.OutOfSample(generator.dirichlet((1, 1, 1), 60), (), 0.0)
               for name in ("w", "x", "y", estimators.ENSEMBLE)}  # fmt: skip
    half, folds = compare.split_halves(groups, "ladder"), np.zeros(60, dtype=int)
    before = cross_validation.choose_entry(results, labels, groups, folds)[1]
    worst = results["w"].probs.argmin(axis=1)
    best = np.stack([result.probs for result in results.values()])[:2].prod(axis=0).argmax(axis=1)
    for new in (worst, best):
        after = cross_validation.choose_entry(results, np.where(half, new, labels), groups, folds)[1]
        assert (after[half] == before[half]).all()
    assert (after[~half] != before[~half]).any()
    assert (half != compare.split_halves(groups, "calibration")).any() and half.sum() == 30


def test_predictions_of_fold_models_are_averaged(rows, results):
    """`predict_rows` is the mean of what the fold models say."""
    fitted = results["length_bins"].baselines
    inputs = columns.read_inputs(rows, ["length_bins"])
    expected = (fitted[0].predict_proba(inputs) + fitted[1].predict_proba(inputs)) / 2
    assert estimators.predict_rows(fitted, rows) == pytest.approx(expected)


def test_inner_folds_keep_groups_together_and_stay_within_the_row_limit(monkeypatch):
    """Strength is tuned on at most TUNING_ROWS rows, never with one prompt on both sides."""
    monkeypatch.setattr(estimators, "TUNING_ROWS", 60)
    groups = np.repeat(np.arange(50), 2).astype(str)
    labels = np.arange(100) % 3
    splits = list(estimators._inner_splits(labels, groups, seed=0))
    assert len(splits) == estimators.INNER_FOLDS
    for train, valid in splits:
        assert len(train) + len(valid) == 60 and not set(groups[train]) & set(groups[valid])
    assert sorted(np.concatenate([valid for _, valid in splits])) == sorted(np.union1d(*splits[0]))
