"""The baselines: exact swaps, what they learn computed in a second way, odd rows, and nothing of rows held out."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.special import softmax
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from prefcls_lib.baselines import columns, logistic, out_of_fold, trees
from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, LENGTH_EDGES, MEMBERS, MODELS, LengthBins, Prior
from prefcls_lib.baselines.out_of_fold import INNER_FOLDS, BaselineMean, fit_out_of_fold, fit_simple, log_odds
from prefcls_lib.data import features, loading, splits
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS, Text
from prefcls_lib.data.schema import RESPONSES, SWAP, check_probs
from prefcls_lib.evaluation import scores
from prefcls_lib.runtime.files import UserError

BASELINES = (*MODELS, ENSEMBLE)
NAME = "structure_logistic"
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
def known(rows) -> tuple[BaselineInputs, np.ndarray, np.ndarray]:
    """Inputs, labels and prompt groups of these rows."""
    return read_inputs(rows), rows["label"].to_numpy(), rows["group"].to_numpy()


@pytest.fixture(scope="module")
def swapped(rows) -> BaselineInputs:
    return read_inputs(rows.rename(columns=dict(zip(RESPONSES, RESPONSES[::-1], strict=True))))


@pytest.fixture(scope="module")
def fitted(known) -> dict:
    """Every baseline, and the offsets out of fold of those that have them."""
    inputs, labels, groups = known
    simple = {name: (BaselineMean((one,)), None) for name, one in fit_simple(inputs, labels).items()}
    return simple | {name: fit_out_of_fold(name, inputs, labels, groups, seed=1) for name in BASELINES[2:]}


@pytest.fixture
def fixed_strength(monkeypatch):
    """The strength is chosen on training rows, so it may move with any label; here it stays."""
    monkeypatch.setattr(MODELS[NAME], "choices", (0.01,))


@pytest.mark.parametrize("name", BASELINES)
def test_swapping_the_answers_swaps_the_probabilities(name, known, swapped, fitted):
    """Every baseline is order-equivariant to the last bits, odd rows included, and gives real probabilities."""
    probs = fitted[name][0].predict_proba(known[0])
    np.testing.assert_allclose(fitted[name][0].predict_proba(swapped)[:, SWAPPED], probs, rtol=0, atol=1e-12)
    check_probs(probs, name)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_training_on_swapped_rows_learns_the_same_baseline(name, files, known, swapped):
    """A fit sees every row in both orders; with extra rows, too, of a file without ties and another."""
    labels, strength = known[1], MODELS[name].strengths(200)[0]
    sources = np.where(labels < 2, np.arange(200) % files, np.arange(200) % files % 2)
    inputs, other_order = (replace(given, sources=sources) for given in (known[0], swapped))
    one = next(MODELS[name].fit_path(inputs, labels, [strength])).predict_proba(inputs)
    other = next(MODELS[name].fit_path(other_order, np.array(SWAP)[labels], [strength])).predict_proba(inputs)
    np.testing.assert_allclose(other, one, rtol=0, atol=2e-3)


def test_the_ensemble_is_the_geometric_mean_of_its_members(known, fitted, monkeypatch):
    """Of all inner models, however many rows are read at a time; offsets out of fold are the members' mean."""
    ensemble, offsets = fitted[ENSEMBLE]
    count = len(ensemble.models)
    assert set(ensemble.members()) == set(MEMBERS) and count == len(MEMBERS) * INNER_FOLDS
    product = np.prod([model.predict_proba(known[0]) ** (1 / count) for model in ensemble.models], axis=0)
    expected = product / product.sum(axis=1, keepdims=True)
    for rows_at_once in (out_of_fold.ROWS_AT_ONCE, 50):
        monkeypatch.setattr(out_of_fold, "ROWS_AT_ONCE", rows_at_once)
        np.testing.assert_allclose(ensemble.predict_proba(known[0]), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(offsets, np.mean([fitted[name][1] for name in MEMBERS], axis=0), atol=1e-12)
    for name in MEMBERS:
        alone = ensemble.members()[name].predict(known[0])
        np.testing.assert_array_equal(alone, fitted[name][0].predict(known[0]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_saved_baseline_predicts_the_same_bytes(name, known, fitted, tmp_path):
    """What is on disk is the model, bit for bit."""
    fitted[name][0].save(tmp_path)
    loaded = BaselineMean.load(tmp_path)
    assert set(loaded.members()) == set(fitted[name][0].members())
    assert loaded.predict(known[0]).tobytes() == fitted[name][0].predict(known[0]).tobytes()


def test_a_baseline_of_other_columns_is_refused(fitted, tmp_path, monkeypatch):
    """As one of another version may be."""
    fitted["prior"][0].save(tmp_path)
    monkeypatch.setattr(out_of_fold, "FEATURE_NAMES", FEATURE_NAMES[1:])
    with pytest.raises(UserError, match="not a baseline of this version"):
        BaselineMean.load(tmp_path)


def test_the_logistic_model_is_that_of_scikit_learn_on_rows_and_swapped_copies():
    """The same probabilities two ways: symmetric weights on the rows, sklearn's free ones on doubled rows."""
    generator = np.random.default_rng(3)
    anti, sym = generator.standard_normal((200, 4)), generator.standard_normal((200, 3))
    labels, own = generator.integers(0, 3, 200), np.zeros(200, dtype=int)
    labels = np.where(anti[:, 0] > 0.3, 0, labels)
    doubled = np.vstack([np.hstack([anti, sym]), np.hstack([-anti, sym])])
    model = LogisticRegression(C=0.02, solver="newton-cg", tol=1e-10)
    model.fit(doubled, np.concatenate([labels, np.array(SWAP)[labels]]))
    ours = logistic.predict_logistic(logistic.fit_logistic([anti], [sym], labels, 0.02, own), [anti], [sym])
    np.testing.assert_allclose(ours, model.predict_proba(doubled[:200]), atol=2e-4)
    parts = [(block[:, :2], sparse.csr_matrix(block[:, 2:].astype(np.float32))) for block in (anti, sym)]
    found = logistic.predict_logistic(logistic.fit_logistic(*parts, labels, 0.02, own), *parts)
    np.testing.assert_allclose(found, ours, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_stored_trees_predict_what_scikit_learn_predicts(monkeypatch, weighted):
    """Our arrays, which read the columns, are scikit-learn's trees, which read their bins: the same probabilities."""
    models, bins = [], []

    class Kept(HistGradientBoostingClassifier):
        def fit(self, *args):
            models.append(self)
            bins.append(args[0])
            return super().fit(*args)

    monkeypatch.setattr("sklearn.ensemble.HistGradientBoostingClassifier", Kept)
    generator = np.random.default_rng(4)
    structure = generator.standard_normal((300, len(SIGNS)))
    structure[:, 3] = np.round(structure[:, 3])  # a column of few values
    labels = np.where(structure[:, 0] > 0.5, 0, generator.integers(0, 3, 300))
    weights = generator.uniform(0.5, 1.5, 300) if weighted else None
    fitted, seen = trees.fit_trees(structure, labels, 12, weights), bins[0][:300]
    assert trees.predict_trees(fitted, structure) == pytest.approx(models[0].predict_proba(seen), abs=1e-12)
    fewer = trees.predict_trees(trees.first_trees(fitted, 5), structure)
    assert fewer == pytest.approx(list(models[0].staged_predict_proba(seen))[4], abs=1e-12)


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
    inputs = BaselineInputs(structure, np.zeros(4, dtype=int), None, np.zeros(4, dtype=int))
    model = next(LengthBins.fit_path(inputs, np.array([0, 2, 1, 2]), [0]))
    bins, here = model.state["bins"], int(np.digitize(0.8, LENGTH_EDGES))
    assert bins[here] == pytest.approx(np.array([1 + 2.5, 0 + 2.5, 1 + 5]) / 12)
    assert bins[0] == pytest.approx(np.array([0.5 + 2.5, 0.5 + 2.5, 1 + 5]) / 12)
    assert bins[3] == pytest.approx([0.25, 0.25, 0.5])
    probs = model.predict_proba(inputs)
    assert probs[0] == pytest.approx(bins[here]) and probs[1] == pytest.approx(bins[here][SWAPPED])


def test_odd_rows_are_shrunk_from_training_counts_by_hand():
    """Identical answers tied 3 times of 4; the empty side lost 2 of 2, once as A and once as B."""
    kinds = np.array([columns.IDENTICAL] * 4 + [columns.EMPTY_A, columns.EMPTY_B, columns.ORDINARY])
    counts = columns.count_kinds(kinds, np.array([2, 2, 2, 0, 1, 0, 1]), np.ones(7))
    assert counts[columns.IDENTICAL].tolist() == [0.5, 0.5, 3.0]
    assert counts[columns.EMPTY_A].tolist() == [0.0, 2.0, 0.0]
    base = np.array([[0.4, 0.4, 0.2], [0.3, 0.5, 0.2], [0.3, 0.5, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    asked = np.array([columns.IDENTICAL, columns.EMPTY_A, columns.EMPTY_B, columns.EMPTY_BOTH, columns.ORDINARY])
    probs = columns.shrink_kinds(counts, asked, base)
    assert probs[0] == pytest.approx(np.array([0.5 + 4, 0.5 + 4, 3 + 2]) / 14)
    assert probs[1] == pytest.approx(np.array([3, 2 + 5, 2]) / 12)
    assert probs[2] == pytest.approx(np.array([2 + 3, 5, 2]) / 12)
    assert (probs[3:] == base[3:]).all()


def test_kinds_of_rows_are_read_from_the_texts(known):
    """The fixture's first rows: four identical pairs, then B and A empty by turns."""
    kinds = known[0].kinds
    assert (kinds[:4] == columns.IDENTICAL).all()
    assert (kinds[4:12:2] == columns.EMPTY_A).all() and (kinds[5:12:2] == columns.EMPTY_B).all()


def test_tf_idf_by_hand():
    """Two of four texts have the second column: too few. Counts (1, e) of equal IDF weigh 1 to 2."""
    counts = sparse.csr_matrix(np.array([[1, 0, 2], [3, 5, 0]], dtype=np.float32))
    state = columns.fit_text((counts, counts))
    assert state["kept"].tolist() == [0] and state["idf"] == pytest.approx([1 + np.log(5 / 5)])
    counts = sparse.csr_matrix(np.array([[0, 0], [1, np.e], [0, 0]], dtype=np.float32))
    nothing = sparse.csr_matrix((3, 2), dtype=np.float32)
    state = {"kept": np.array([0, 1]), "idf": np.ones(2, dtype=np.float32)}
    difference, distance = columns.text_columns(state, (nothing, counts))
    weights = columns.TEXT_SCALE * np.array([1, 2]) / np.sqrt(5)
    np.testing.assert_allclose(difference.toarray(), [[0, 0], -weights, [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(distance.toarray(), [[0, 0], weights, [0, 0]], rtol=1e-6)


def test_features_by_hand():
    """The words are the, the, the, cat, twice: of seven pairs three are different."""
    a, b, prompt = Text(["The the the cat.\n\nThe the the cat"]), Text([""]), Text(["The?"])
    row = dict(zip(FEATURE_NAMES, features.compute_features([prompt], [a], [b])[0], strict=True))
    assert row["diff_repeated_pairs"] == pytest.approx(1 - 3 / 7) and row["mean_log_paragraphs"] == np.log(2) / 2
    assert row["diff_function_words"] == 6 / 8 and row["diff_log_different_words"] == pytest.approx(np.log(3))
    assert (row["diff_prompt_overlap"], row["diff_unfinished"], row["diff_empty"]) == (1, 1, -1)
    assert row["dist_log_chars"] == row["diff_log_chars"] == np.log(34)
    expected = np.log(9) * (np.log(34) / 2 - 6.7)
    assert row["diff_log_words_times_length"] == pytest.approx(expected)


def test_a_swap_changes_the_signs_of_the_features(known, swapped):
    """What SIGNS says of each is what happens to it when A and B change places."""
    assert (swapped.dense == known[0].dense * SIGNS).all() and len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)


@pytest.mark.parametrize("text", [" ", "\n", "\t \n", "7", "`", "-", "*", "#", "- ", "1.\n", "**a", "a", "\u4e00"])
def test_reading_takes_time_in_proportion_to_length(text):
    """Twice the characters take about twice the time, whatever they are: four times would be a quadratic pattern."""
    seconds = {}
    for count in (100_000, 200_000, 100_000, 200_000, 100_000, 200_000):
        answer = text * (count // len(text))
        row = pd.DataFrame({"prompt": [["why"]], RESPONSES[0]: [[answer]], RESPONSES[1]: [["x"]]})
        started = time.process_time()
        read_inputs(row)
        seconds[count] = min(time.process_time() - started, seconds.get(count, np.inf))
    assert seconds[200_000] < 3.5 * seconds[100_000]


def test_rows_that_are_hardly_any_text(known):
    """Texts without words, a missing model name, one prompt for all rows, a class with two rows: probabilities."""
    texts = ["", " \n", "!?", "\ud800", "é", "```"]
    table = pd.DataFrame([(["?"], [a], [b]) for a in texts for b in texts if a != b], columns=["prompt", *RESPONSES])
    inputs, labels = read_inputs(table), np.where(np.arange(30) < 2, 2, np.arange(30) % 2)
    for groups in (np.full(30, "one prompt"), np.arange(30).astype(str)):
        baseline, offsets = fit_out_of_fold(ENSEMBLE, inputs, labels, groups, seed=0)
        check_probs(softmax(offsets, axis=1), "offsets")
        check_probs(baseline.predict_proba(known[0]), "new rows")


def test_every_baseline_learns_that_the_longer_answer_wins():
    """On rows where length alone decides, all baselines above the prior beat it clearly."""
    generator = np.random.default_rng(5)
    words = ["red", "green", "blue", "stone", "river", "cloud", "seven", "apple"]
    lines = []
    for number in range(240):
        lengths = generator.choice([5, 40], size=2, replace=False)
        a, b = (" ".join(generator.choice(words, size)) for size in lengths)
        lines.append(([f"prompt {number}"], [a], [b], 2 if number % 4 == 0 else int(lengths[1] > lengths[0])))
    table = pd.DataFrame(lines, columns=["prompt", *RESPONSES, "label"])
    inputs, labels, train = read_inputs(table), table["label"].to_numpy(), np.arange(160)
    held_out, fitted = inputs.take(np.arange(160, 240)), fit_simple(inputs.take(train), labels[train])
    for name in BASELINES[2:]:
        fitted[name], _ = fit_out_of_fold(name, inputs.take(train), labels[train], train.astype(str), seed=0)
    losses = {name: scores.log_loss(labels[160:], one.predict_proba(held_out)) for name, one in fitted.items()}
    assert set(losses) == set(BASELINES)
    assert max(loss for name, loss in losses.items() if name != "prior") < losses["prior"] - 0.2


def test_log_odds_by_hand():
    """Of (.5, .125, .375): m = ln(4) / 2, t = ln .375 - (ln .5 + ln .125) / 2 = ln 1.5."""
    found = log_odds(np.array([[0.5, 0.125, 0.375]]))
    assert found == pytest.approx(np.log([[2, 0.5, 1.5]]))
    assert softmax(found, axis=1) == pytest.approx(np.array([[0.5, 0.125, 0.375]]))


def test_offset_of_a_training_row_does_not_know_its_label(known, fixed_strength):
    """Other labels for all rows of one prompt change the offsets of other rows, and not those of this prompt's rows."""
    inputs, labels, groups = known
    _, before = fit_out_of_fold(NAME, inputs, labels, groups, seed=1)
    here = groups == groups[57]
    _, after = fit_out_of_fold(NAME, inputs, np.where(here, (labels + 1) % 3, labels), groups, seed=1)
    np.testing.assert_array_equal(after[here], before[here])
    assert not np.allclose(after[~here], before[~here])


def test_parallel_processes_give_the_same(known, monkeypatch, fixed_strength, capsys):
    """Models that are fitted in processes of their own are the same to the bit; each fit prints a line."""
    one, offsets = fit_out_of_fold(NAME, *known, seed=1)
    monkeypatch.setattr(out_of_fold, "MIN_ROWS_TO_SHARE", 0)
    monkeypatch.setattr(out_of_fold.joblib, "cpu_count", lambda: 2)
    other, shared = fit_out_of_fold(NAME, *known, seed=1, label="fold0")
    np.testing.assert_array_equal(shared, offsets)
    np.testing.assert_array_equal(other.models[4].state["w"], one.models[4].state["w"])
    assert capsys.readouterr().out.count(f"fold0: {NAME}, inner fold") == INNER_FOLDS


def test_a_class_that_is_missing_in_an_inner_fold(known, capsys):
    """All ties share a prompt: the model without it has no tie to learn, and predicts the class shares."""
    inputs, labels, groups = known
    labels = np.where(groups == groups[57], 2, np.arange(len(labels)) % 2)
    fitted, offsets = fit_out_of_fold(NAME, inputs, labels, groups, seed=1, label="fold0")
    (lacking,) = [model for model in fitted.models if "prior" in model.state]
    assert np.isfinite(offsets).all() and "a class is missing" in capsys.readouterr().out
    expected = next(Prior.fit_path(inputs, labels, [0])).predict_proba(inputs)
    np.testing.assert_array_equal(lacking.predict_proba(inputs), expected)


def test_the_strength_is_chosen_on_enough_rows(known, monkeypatch):
    """All are tried in as many inner folds as hold TUNING_ROWS rows; the best of their sum is fitted in all."""
    inputs, labels, groups = known
    strengths, inner = (0.0005, 0.002, 0.05), out_of_fold.assign_inner_folds(groups, seed=1)
    monkeypatch.setattr(MODELS[NAME], "choices", strengths)
    tried = []
    fit_path = out_of_fold._fit_path
    monkeypatch.setattr(out_of_fold, "_fit_path", lambda *given: tried.append(len(given[4])) or fit_path(*given))
    monkeypatch.setattr(out_of_fold, "TUNING_ROWS", 60)
    fitted, _ = fit_out_of_fold(NAME, inputs, labels, groups, seed=1)
    assert sum(inner == 0) < 60 < sum(inner < 2) and tried == [3, 3, 1, 1, 1]
    losses = np.zeros(3)
    for here in (inner == 0, inner == 1):
        models = MODELS[NAME].fit_path(inputs.take(~here), labels[~here], strengths)
        losses += [scores.row_losses(labels[here], model.predict_proba(inputs.take(here))).sum() for model in models]
    best = strengths[int(losses.argmin())]
    (expected,) = MODELS[NAME].fit_path(inputs.take(inner != 4), labels[inner != 4], [best])
    np.testing.assert_array_equal(fitted.models[4].state["w"], expected.state["w"])
