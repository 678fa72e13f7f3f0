"""Extra training rows: a tie bias for each file, and no prompt of a validation row."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import log_softmax, softmax

from prefcls_lib.baselines import columns, logistic
from prefcls_lib.baselines.estimators import MODELS, Baseline
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS
from prefcls_lib.data.loading import read_rows, write_rows
from prefcls_lib.data.schema import LABEL_COLUMNS, SOURCE
from prefcls_lib.pipeline import folds, steps
from prefcls_lib.pipeline.job import EXTRA, load_baseline, open_folder, read_job
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.step import training_loss

WITHOUT_TEXT = ("prior", "length_bins", "structure_logistic", "structure_boosting")


def draw(count: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, and votes by length in which `shift` is added to the log-odds of a tie."""
    random = np.random.default_rng(seed)
    structure = random.normal(size=(count, len(SIGNS)))
    gap = structure[:, FEATURE_NAMES.index("diff_log_chars")]
    probs = softmax(np.column_stack([gap, -gap, np.full(count, 0.1 + shift)]), axis=1)
    return structure, (random.random((count, 1)) > probs.cumsum(axis=1)[:, :2]).sum(axis=1)


def join(*parts: tuple[np.ndarray, np.ndarray, int]) -> tuple[columns.BaselineInputs, np.ndarray]:
    """Inputs and labels of (features, labels, source)."""
    structure, labels = (np.concatenate(values) for values in list(zip(*parts, strict=True))[:2])
    sources = np.concatenate([np.full(len(part[1]), part[2]) for part in parts])
    return columns.BaselineInputs(structure, np.zeros(len(labels), dtype=int), None, sources=sources), labels


def fit(name: str, inputs: columns.BaselineInputs, labels: np.ndarray) -> Baseline:
    return next(MODELS[name].fit_path(inputs, labels, [25 if name == "structure_boosting" else 0.01]))


@pytest.mark.parametrize("kind", ["more ties", "no ties"])
@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_another_share_of_ties_shifts_no_prediction(name, kind):
    """Predictions keep the training file's share of ties, which they would not if the rows were taken for its own."""
    own, (structure, labels) = draw(1200, 0.0, 0), draw(2400, np.log(4), 1)
    kept = labels < 2 if kind == "no ties" else labels >= 0
    inputs, labels = join((*own, 0), (structure[kept], labels[kept], 1))
    asked, _ = join((*draw(1200, 0.0, 2), 0))
    share = (own[1] == 2).mean()
    assert fit(name, inputs, labels).predict_proba(asked)[:, 2].mean() == pytest.approx(share, abs=0.025)
    mixed = replace(inputs, sources=np.zeros(len(labels), dtype=int))
    assert abs(fit(name, mixed, labels).predict_proba(asked)[:, 2].mean() - share) > 0.1


def test_logistic_model_with_extra_rows_is_the_optimum_of_its_loss():
    """The gradient of the loss vanishes, written out: a tie shift in the second file."""
    random = np.random.default_rng(3)
    anti, sym, labels = random.normal(size=(150, 3)), random.normal(size=(150, 2)), random.integers(0, 3, 150)
    sources = np.repeat([0, 2], 75)
    found = logistic.fit_logistic([anti], [sym], labels, 0.02, sources)

    def loss(p: np.ndarray) -> float:
        tie = sym @ p[3:5] + p[5] + np.where(sources == 2, p[7], 0.0)
        logits = log_softmax(np.column_stack([anti @ p[:3], -anti @ p[:3], tie]), axis=1)
        return -logits[np.arange(150), labels].mean() + (p[:3] @ p[:3] + p[3:5] @ p[3:5] / 3) / (2 * 0.02 * 150)

    at = np.concatenate([found["w"], found["v"], found["b"], found["tie_shifts"]])
    assert at[6] == 0 and abs(at[7]) > 0.01  # no row is of the first file
    assert np.abs(approx_fprime(at, loss, 1e-6)).max() < 2e-4


def test_weights_and_shifts_by_hand():
    """A quarter of ties in the training file, a half in the first: its ties weigh 1/2 and the others 3/2. The second is
    all ties and the third without: they weigh nothing."""
    labels, sources = np.array([0, 1, 0, 2, 2, 1, 2, 2, 0, 1]), np.array([0] * 4 + [1] * 2 + [2] * 2 + [3] * 2)
    assert columns.tie_weights(labels, sources).tolist() == [1] * 4 + [0.5, 1.5] + [0] * 4
    assert (columns.tie_weights(labels, np.zeros(10, dtype=int)) == 1).all()
    shifts = columns.tie_shares_shift(labels, sources)
    assert shifts == pytest.approx(np.log([1.5 / 1.5, 2.5 / 0.5, 0.5 / 2.5]) - np.log(1.5 / 3.5))
    added = columns.tie_shifts(sources, shifts)
    assert added.tolist() == [0] * 4 + [shifts[0]] * 2 + [shifts[1]] * 2 + [shifts[2]] * 2


def test_training_loss_by_hand():
    """A row of the training file, one of a file with a tie shift of 1."""
    logits = np.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    examples = Examples([], np.zeros((2, 2), int), np.array([0, 2]), tie_shifts=np.array([0, 1], np.float32))
    first, second = log_softmax(logits[0]), log_softmax(logits[1] + [0, 0, 1])
    expected = -(0.8 * first[0] + 0.8 * second[2]) - 0.2 * (first.mean() + second.mean())
    assert training_loss((torch.tensor(logits),) * 2, examples, np.arange(2), 0.2).item() == pytest.approx(expected)
    assert examples.own.tolist() == [0]


@pytest.fixture
def files(home, tmp_path):
    """Two extra files with prompts of their own: of six rows two ties; four rows without ties."""
    rows = pd.read_csv(home / "train.csv", dtype=str, keep_default_na=False).head(6)
    rows = rows.assign(id="x" + rows["id"], prompt=[f'["new {number}"]' for number in range(6)])
    winners = np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]
    one = rows.assign(**dict(zip(["winner_model_a", "winner_model_b", "winner_tie"], winners.T, strict=True)))
    two = one[one["winner_tie"] == 0].assign(prompt=[f'["newer {number}"]' for number in range(4)])
    for name, table in (("one", one), ("two", two)):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return {name: str(home / f"{name}.csv") for name in ("train", "test")}, tmp_path


def test_files_are_found_and_read_with_their_source(files, monkeypatch):
    """A list or with commas, one hash for each; a file of an attached data set by its name."""
    places, folder = files
    names = [str(folder / "one.csv"), str(folder / "two.csv")]
    config = RunConfig(**places, extra_train=names, out=str(folder / "run"), num_folds=3)
    assert config == replace(config, extra_train=", ".join(names).replace(" ", ""))
    job = read_job(config)
    assert job.table.loc[job.table["fold"] == EXTRA, SOURCE].tolist() == [1] * 6 + [2] * 4
    assert len(job.data_sha256["extra_train"].split(",")) == 2
    config = replace(config, extra_train="two.csv")
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(folder / "input"))
    with pytest.raises(UserError, match=r"two\.csv"):
        read_job(config)
    place, other = (folder / "input" / "datasets" / "me" / name for name in ("prefcls-extra", "another"))
    place.mkdir(parents=True)
    (folder / "two.csv").rename(place / "two.csv")
    assert (read_job(config).table["fold"] == EXTRA).sum() == 4
    other.mkdir()
    shutil.copy(folder / "one.csv", other / "two.csv")
    with pytest.raises(UserError, match="more than once"):
        read_job(config)


def test_training_rows_among_the_extra_rows_leak_nothing(home, tmp_path, capsys):
    """A planted leak: rows of fold 0, whose votes change nothing of fold 0's baseline, and much of fold 1's."""
    places = {name: str(home / f"{name}.csv") for name in ("train", "test")}
    probs = []
    for turn in (0, 1):
        config = RunConfig(**places, extra_train=str(tmp_path / f"leak{turn}.csv"), out=str(tmp_path / f"run{turn}"),
                           num_folds=3, folds=[0, 1], start_from="structure_logistic")  # fmt: skip
        rows = read_rows(home / "train.csv", labelled=True)
        leak = rows[read_job(replace(config, extra_train=None)).rows["fold"] == 0]
        write_rows(config.extra_train, leak.assign(label=(leak["label"] + turn) % 3))
        table = steps.fit_baselines(open_folder(read_job(config)))
        assert f"extra_train: {len(leak)} of {len(leak)} rows are training rows, too." in capsys.readouterr().out
        table = table[table["model"] == "structure_logistic"]
        probs.append([table.loc[table["fold"] == fold, list(LABEL_COLUMNS)].to_numpy() for fold in (0, 1)])
    np.testing.assert_array_equal(probs[0][0], probs[1][0])
    assert np.abs(probs[0][1] - probs[1][1]).max() > 0.01


@pytest.mark.parametrize("start_from", ["none", "structure_ensemble"])
def test_network_gets_the_tie_shift_of_each_file(files, home, start_from):
    """That of the shares, or on a baseline the mean of its models' own; trees count with that of the shares."""
    places, folder = files
    config = RunConfig(**places, extra_train=f"{folder / 'one.csv'},{folder / 'two.csv'}", out=str(folder / "run"),
                       backbone=str(home / "backbone"), num_folds=3, max_length=32, start_from=start_from)  # fmt: skip
    job = steps.prepare(steps.start(config))
    steps.fit_baselines(job)
    train, valid, *_ = folds.split_rows(job, 0)
    own = int((job.rows["fold"] != 0).sum())
    ties = int((train.labels[:own] == 2).sum())
    shifts = np.log([2.5 / 4.5, 0.5 / 4.5]) - np.log((ties + 0.5) / (own - ties + 0.5))
    if start_from != "none":
        models = load_baseline(job.folder, 0)[0].models
        assert len({model.name for model in models}) == 2
        shifts = np.mean([model.state.get("tie_shifts", shifts) for model in models], axis=0)
    assert train.tie_shifts == pytest.approx(np.repeat([0, *shifts], [own, 6, 4]), abs=1e-5)
    assert valid.tie_shifts is None
