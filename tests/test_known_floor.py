"""The generator of rows whose best log loss is known, and one run on them."""

import numpy as np
import pytest
from scipy.special import softmax

from prefcls_lib.data import loading
from prefcls_lib.data.schema import class_shares
from prefcls_lib.evaluation.scores import row_losses
from report.studies import known_floor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 400 generated rows and a backbone of two layers, and the distributions of the labels."""
    folder = tmp_path_factory.mktemp("floor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_floor, "LAYERS", 2)
        known_floor.prepare(folder, 400, seed=1)
    return folder, np.load(folder / "probs.npy")


def test_labels_follow_the_distribution_of_the_text(made):
    """It is computed again from the written words of one row; class shares are its mean, within four deviations."""
    folder, probs = made
    rows = loading.read_rows(folder / "train.csv", labelled=True)
    worth = dict(zip(*known_floor.make_words(), strict=True))
    a, b = (rows.loc[7, name][0].split() for name in ("response_a", "response_b"))
    d = sum(worth[w] for w in a) - sum(worth[w] for w in b) + known_floor.LENGTH_WORTH * (len(a) - len(b))
    np.testing.assert_allclose(probs[7], softmax([d, -d, 0.0]), atol=1e-9)
    variances = (probs * (1 - probs)).mean(axis=0) / len(rows)
    assert (np.abs(class_shares(rows["label"]) - probs.mean(axis=0)) < 4 * np.sqrt(variances)).all()
    losses, entropy = row_losses(rows["label"], probs), -(probs * np.log(probs)).sum(axis=1)
    assert abs(losses.mean() - entropy.mean()) < 4 * losses.std() / np.sqrt(len(rows))


def test_a_variant_is_compared_with_the_floor_of_its_own_validation_rows(made):
    """Two layers, ours: far from the floor, and no better than it; 360 rows in steps of 32, two epochs."""
    folder, probs = made
    found = known_floor.run_variant("ours", folder, seed=42)
    assert found["floor"] < found["log_loss"] < found["prior"] + 0.05
    assert probs.min() > 0 and found["steps"] == 24
