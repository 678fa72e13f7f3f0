"""The generator of rows whose best log loss is known, and one run on them."""

import numpy as np
import pytest

from prefcls_lib.data import loading
from prefcls_lib.evaluation import scores
from report.studies import known_floor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with train.csv of 400 generated rows and the distributions of their labels."""
    folder = tmp_path_factory.mktemp("floor")
    rows, probs = known_floor.make_rows(400, seed=1)
    rows.to_csv(folder / "train.csv", index=False)
    rows.iloc[:10, :4].to_csv(folder / "test.csv", index=False)
    np.save(folder / "probs.npy", probs)
    return folder, probs


def test_labels_follow_the_known_distribution(made):
    """As the library reads them: class shares and log loss are those of the distribution, within four deviations."""
    folder, probs = made
    labels = loading.read_rows(folder / "train.csv", labelled=True)["label"].to_numpy()
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    shares, variances = np.bincount(labels) / len(labels), (probs * (1 - probs)).mean(axis=0) / len(labels)
    assert (np.abs(shares - probs.mean(axis=0)) < 4 * np.sqrt(variances)).all()
    entropy = -(probs * np.log(probs)).sum(axis=1)
    spread = np.sqrt(((probs * np.log(probs) ** 2).sum(axis=1) - entropy**2).mean() / len(labels))
    assert abs(scores.log_loss(labels, probs) - entropy.mean()) < 4 * spread


def test_distribution_is_that_of_the_text(made):
    """Computed again from the written words of one row, by hand."""
    folder, probs = made
    worth = dict(zip(*known_floor.make_words(), strict=True))
    row = loading.read_rows(folder / "train.csv", labelled=True).iloc[7]
    a, b = (row[name][0].split() for name in ("response_a", "response_b"))
    d = sum(worth[w] for w in a) - sum(worth[w] for w in b) + known_floor.LENGTH_WORTH * (len(a) - len(b))
    logits = np.array([d, -d, 0.0])
    np.testing.assert_allclose(probs[7], np.exp(logits) / np.exp(logits).sum(), atol=1e-9)


def test_a_variant_is_compared_with_the_floor_of_its_own_validation_rows(made):
    """Two layers, ours: far from the floor, and no better than it; 360 rows in steps of 32, two epochs."""
    folder, probs = made
    known_floor.make_backbone(folder / "backbone", seed=0, num_layers=2)
    found = known_floor.run_variant("ours", folder, seed=42)
    assert found["floor"] < found["log_loss"] < found["prior"] + 0.05
    assert probs.min() > 0 and found["steps"] == 24
