"""Scores, intervals, comparisons and slices, worked out by hand or against scikit-learn."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss

from prefcls_lib.data import loading
from prefcls_lib.evaluation import compare, scores, slices
from prefcls_lib.runtime.files import UserError

HALF_AND_QUARTERS = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])


def _random_probs(num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([4, 4, 4], num_rows)


def _rows(prompts: list, a: list, b: list, **columns: list) -> pd.DataFrame:
    """Rows as `loading.read_rows` gives them, of one turn each."""
    rows = pd.DataFrame({"id": [str(number) for number in range(len(prompts))]})
    for name, texts in (("prompt", prompts), ("response_a", a), ("response_b", b)):
        rows[name] = pd.Series([[text] if isinstance(text, str) else text for text in texts], dtype=object)
    rows["group"] = [loading.prompt_group(turns[0]) for turns in rows["prompt"]]
    return rows.assign(**columns)


def test_scores_by_hand():
    """The true classes got 1/2 and 1/4: log loss (ln 2 + ln 4) / 2 = 1.5 ln 2. Brier: row 1 is right, .25+.0625+.0625 =
    .375; row 2 is wrong, .5625+.25+.0625 = .875; mean .625. Each is a fold: sample deviation ln 2 / sqrt(2); of a
    single fold none is known."""
    labels, groups = np.array([0, 0]), np.array(["p", "q"])
    assert scores.row_losses(labels, HALF_AND_QUARTERS) == pytest.approx([np.log(2), np.log(4)])
    found = compare.score_predictions(labels, HALF_AND_QUARTERS, groups, np.array([0, 3]))
    assert found["log_loss"] == scores.log_loss(labels, HALF_AND_QUARTERS) == pytest.approx(1.5 * np.log(2))
    assert (found["accuracy"], found["brier_score"]) == (0.5, pytest.approx(0.625))
    assert found["log_loss_fold_sd"] == pytest.approx(np.log(2) / np.sqrt(2))
    one_fold = compare.score_predictions(labels, HALF_AND_QUARTERS, groups, np.array([3, 3]))
    assert one_fold == found | {"log_loss_fold_sd": None}


def test_log_loss_equals_that_of_scikit_learn_even_for_a_certain_mistake():
    """Clipping is scikit-learn's, so a probability of zero costs the same here as there."""
    labels = np.array([0, 1, 2, 1])
    probs = np.vstack([_random_probs(3, 0), [[1.0, 0.0, 0.0]]])
    assert scores.log_loss(labels, probs) == pytest.approx(sklearn_log_loss(labels, probs, labels=[0, 1, 2]))


def test_expected_calibration_error_by_hand():
    """Bin (.4,.6]: confidence .5, accuracy 1/2, gap 0; bin (.8,1]: .9 and 1, gap .1; half the rows each. If calibrated:
    rows of confidence .6 and .9 have errors .4 or .6 (p .6, .4), .1 or .9 (p .9, .1): mean .33."""
    probs = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    labels = np.array([0, 1, 1, 2])
    assert scores.expected_calibration_error(labels, probs, num_bins=5) == pytest.approx(0.05)
    table = scores.reliability_table(labels, probs, num_bins=5)
    assert table.to_dict("list") == {"count": [2, 2], "confidence": [0.5, 0.9], "accuracy": [0.5, 1.0]}
    probs = np.array([[0.6, 0.2, 0.2], [0.05, 0.05, 0.9]])
    assert scores.error_if_calibrated(probs) == pytest.approx((0.48 + 0.18) / 2, abs=0.02)


@pytest.mark.parametrize(("prompts", "rows", "draws"), [(200, 10, 4000), (3000, 1, 500)])
def test_bootstrap_interval_is_that_of_the_prompts_means(monkeypatch, prompts, rows, draws):
    """Ten equal rows a prompt: 200 independent values, not 2,000. Where a resample draws 500 of 3,000: still 3,000."""
    monkeypatch.setattr(compare, "MOST_DRAWS", draws)
    values = np.random.default_rng(1).standard_normal(prompts)
    low, high = compare.bootstrap_interval(np.repeat(values, rows), np.repeat(np.arange(prompts), rows).astype(str))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(prompts), rel=0.08)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * (high - low))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    """Mean 0 data in groups of 1 to 5 rows that share an effect: 95 % intervals hold 0 in 88 to 100 draws."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        groups = np.repeat(np.arange(80), generator.integers(1, 6, size=80))
        values = generator.standard_normal(80)[groups] + 0.3 * generator.standard_normal(len(groups))
        low, high = compare.bootstrap_interval(values, groups.astype(str))
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_no_interval_from_one_group():
    """A single prompt says nothing about others: no interval, and no verdict."""
    labels, probs = np.array([0, 1]), HALF_AND_QUARTERS
    assert np.isnan(compare.bootstrap_interval(np.arange(2.0), np.array(["g", "g"]))).all()
    with pytest.raises(UserError, match="share one prompt"):
        compare.compare(labels, probs, probs, np.array(["g", "g"]))


def test_compare_gives_each_verdict_and_covers_the_known_difference():
    """.5 against about .4 for the true class: near ln(.4/.5). The interval is 3.92 standard errors wide, the smallest
    effect to plan with is 2.8 of them."""
    generator = np.random.default_rng(3)
    labels, groups = generator.integers(0, 3, 600), generator.integers(0, 300, 600).astype(str)
    good = np.where(np.eye(3)[labels] == 1, 0.5, 0.25)
    true = generator.uniform(0.35, 0.45, (600, 1))
    fair = np.where(np.eye(3)[labels] == 1, true, (1 - true) / 2)
    beats = compare.compare(labels, good, fair, groups)
    assert beats.verdict == "BEATS" and beats.low < np.log(0.4 / 0.5) < beats.high < 0
    assert compare.compare(labels, fair, good, groups).verdict == "LOSES"
    same = compare.compare(labels, good, good, groups)
    assert (same.verdict, same.difference, same.low, same.high, same.p) == ("INCONCLUSIVE", 0.0, 0.0, 0.0, 1.0)
    assert (beats.rows, beats.groups) == (600, len(set(groups)))
    noise = compare.compare(labels, _random_probs(600, 5), _random_probs(600, 6), groups)
    assert noise.verdict == noise.to_dict()["verdict"] == "INCONCLUSIVE" and noise.low < 0 < noise.high
    assert noise.smallest_detectable == pytest.approx(2.8 / 3.92 * (noise.high - noise.low), rel=0.1)
    assert compare.Comparison.from_dict(noise.to_dict()) == noise


def test_p_by_hand():
    """One of the means -1, 1, 1, 3 is not above zero: p = 2 (1 + 1) / (4 + 1). Of 1, 1, 1, 3 none: 2 / 5. Differences
    of ln 2 and -3 ln 2 in two prompts: both drawn from the first with probability 1/4, so p is near 1/2."""
    assert compare._interval_and_p(np.array([1.0, -1.0, 3.0, 1.0])) == ((-1.0, 3.0), 0.8)
    for sign in (1, -1):
        assert compare._interval_and_p(sign * np.array([1.0, 1.0, 3.0, 1.0]))[1] == 0.4
    assert compare._interval_and_p(np.zeros(4))[1] == 1
    probs, other = np.array([[0.25, 0.25, 0.5], [0.8, 0.1, 0.1]]), np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    found = compare.compare(np.array([0, 0]), probs, other, np.array(["p", "q"]))
    assert found.difference == pytest.approx(-np.log(2))
    assert found.p == pytest.approx(0.5, abs=0.03) and found.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("num_means", [39, 200, 9_999, 10_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_verdict_and_interval_agree_at_the_border(num_means, sign):
    """The 2.5 % of means that may lie on the other side, and one more: p passes LEVEL where the interval reaches 0."""
    allowed = int(0.025 * (num_means + 1)) - 1
    for count in (allowed, allowed + 1):
        (low, high), p = compare._interval_and_p(sign * np.where(np.arange(num_means) < count, -1.0, 1.0))
        assert (p <= compare.LEVEL) == (low > 0 or high < 0) == (count == allowed)


def test_holm_correction_of_four_by_hand():
    """.01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .04 x 1 = .04, but not below .06. In the order given."""
    table = [compare.Comparison(-0.1, -0.2, -0.01, 0.1, 50, 40, p) for p in (0.04, 0.01, 0.03, 0.02)]
    corrected = compare.holm_correction(table)
    assert [one.p for one in corrected] == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert [one.verdict for one in table] == ["BEATS"] * 4
    assert [one.verdict for one in corrected] == ["INCONCLUSIVE", "BEATS", "INCONCLUSIVE", "INCONCLUSIVE"]
    assert compare.holm_correction(table[:1]) == table[:1], "a table of one"
    assert [one.p for one in compare.holm_correction([replace(table[0], p=0.6)] * 2)] == [1.0, 1.0]


def test_parts_depend_on_the_group_and_not_on_the_order():
    """The same group is always in the same part, the parts are of equal size, and two groups are enough for two."""
    groups = np.array([f"group {number % 40}" for number in range(120)])
    part = compare.split_groups(groups, 4, "step")
    assert (compare.split_groups(groups[::-1], 4, "step") == part[::-1]).all()
    assert np.bincount(part).tolist() == [30] * 4
    assert sum(compare.split_groups(np.array(["p", "q", "p"]), 2, "step")) in (1, 2)


def test_cross_fitted_choice_takes_each_half_from_the_step_that_the_other_half_chose():
    """Step 0 is good on half one only, step 1 on the other: each half gets the step that is bad for it."""
    groups = np.arange(41).astype(str)
    half, labels = compare.split_groups(groups, 2, "step") == 1, np.zeros(41, dtype=int)
    good, bad = [0.8, 0.1, 0.1], [0.2, 0.4, 0.4]
    steps = np.stack([np.where(half[:, None], good, bad), np.where(half[:, None], bad, good)])
    assert (compare.choose_cross_fitted(steps, labels, groups) == bad).all()


def test_flip_rate_undoes_the_swap_first():
    """Rows 1 and 2 say A in both orders (B's column once swapped), row 3 the first answer: 1 flip of 3."""
    probs = np.array([[0.6, 0.2, 0.2], [0.5, 0.2, 0.3], [0.6, 0.2, 0.2]])
    swapped = np.array([[0.2, 0.6, 0.2], [0.3, 0.5, 0.2], [0.6, 0.2, 0.2]])
    assert slices.flip_rate(probs, swapped) == pytest.approx(1 / 3)


def test_slices_of_four_rows_by_hand():
    """Each row is put where its text says, and slices without rows are left out."""
    rows = _rows(
        ["p", ["q", "r"], "s", "t"], ["a" * 500, ["same", "x"], "", "```code```"],
        ["b" * 100, ["same", "x"], "é" * 9, "12345678901"], label=[0, 2, 1, 2],
        model_a=["m", "n", "m", "k"], model_b=["n", "m", "n", "l"],
    )  # fmt: skip
    probs = np.array([[0.5, 0.25, 0.25]] * 4)
    table = slices.slice_table(rows, rows["label"].to_numpy(), probs, cut=np.array([True, False, False, False]), top=1)
    assert table.set_index(["name", "value"])["count"].to_dict() == {
        ("who is longer", "B, 3 times or more"): 1, ("who is longer", "about equal"): 2,
        ("who is longer", "A, 3 times or more"): 1, ("characters", "under 1,000"): 4, ("turns", "1"): 3,
        ("turns", "2"): 1, ("code fence in an answer", "no"): 3, ("code fence in an answer", "yes"): 1,
        ("non-ASCII characters", "none"): 3, ("non-ASCII characters", "10 % or more"): 1, ("tie", "no"): 2,
        ("tie", "yes"): 2, ("identical answers", "no"): 3, ("identical answers", "yes"): 1,
        ("empty or null answer", "no"): 3, ("empty or null answer", "yes"): 1, ("cut", "no"): 3, ("cut", "yes"): 1,
        ("model pair", "m / n"): 3,
    }  # fmt: skip
    tie = table[(table["name"] == "tie") & (table["value"] == "no")].iloc[0]
    assert tie["log_loss"] == pytest.approx((np.log(2) + np.log(4)) / 2) and tie["accuracy"] == 0.5


def test_slices_of_real_rows_hold_every_row_once_and_compare_with_a_baseline():
    """Counts of a slicing sum to all rows, and the difference is that of the two log losses."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    labels, probs = rows["label"].to_numpy(), _random_probs(len(rows), 9)
    uniform = np.full_like(probs, 1 / 3)
    table = slices.slice_table(rows, labels, probs, uniform, top=3)
    sums = table[table["name"] != "model pair"].groupby("name")["count"].sum()
    assert (sums == len(rows)).all() and len(sums) == 8
    assert (table["name"] == "model pair").sum() == 3
    assert table["difference"].to_numpy() == pytest.approx(table["log_loss"].to_numpy() - np.log(3))
    known = table.dropna(subset=["low", "high"])
    assert (known["low"] <= known["log_loss"]).all() and (known["log_loss"] <= known["high"]).all()
    assert (table["count"][table["low"].isna()] < 20).all() and len(known) > len(table) / 2  # few prompts: no interval


def test_most_confident_mistakes_come_first_and_point_at_their_rows():
    """Row 2 is wrong at .8, row 0 at .5; row 1 is right and left out."""
    rows = _rows(["p", "q", "r"], ["a"] * 3, ["b"] * 3, label=[1, 1, 2])
    probs = np.array([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.8, 0.1, 0.1]])
    table = slices.most_confident_mistakes(rows, probs, 5)
    assert list(table.index) == [2, 0]
    wanted = {"id": ["2", "0"], "label": [2, 1], "predicted": [0, 0], "confidence": [0.8, 0.5]}
    assert table.to_dict("list") == wanted
