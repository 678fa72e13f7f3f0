"""Does a calibration that was fitted on the models of single folds suit their mean, which is what is submitted?

    python report/studies/mean_of_folds.py train.csv

A tenth of the rows is held out in turn. On the others a five-fold entry of the ladder is fitted, structure_logistic
and structure_tfidf at one strength. Its temperature and tie bias come from the out-of-fold predictions, each of one
model; they are applied to the mean of the five models on the tenth. Beside it: a calibration fitted on such means, of
the other tenths.
"""

import sys

import numpy as np

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import fit_baseline
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.evaluation.calibration import blend_out_of_fold, fit_calibration, geometric_mean
from prefcls_lib.evaluation.metrics import compare, log_loss

NAMES, STRENGTH, SEED = ("structure_logistic", "structure_tfidf"), 0.003, 42


def main(path: str) -> None:
    """Print the log losses of the held-out rows, and what the calibrations are."""
    rows = read_rows(path, labelled=True)
    inputs, tenths = read_inputs(rows, NAMES), assign_folds(rows, 10, SEED)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    mean, calibrated, single, temperatures = np.zeros((len(rows), 3)), np.zeros((len(rows), 3)), [], []
    for tenth in range(10):
        held, rest = np.flatnonzero(tenths == tenth), np.flatnonzero(tenths != tenth)
        folds, out_of_fold = assign_folds(rows.iloc[rest].reset_index(drop=True), 5, SEED), np.zeros((len(rest), 3))
        for fold in range(5):
            train = rest[folds != fold]
            models = [fit_baseline(n, inputs.take(train), labels[train], groups[train], SEED, STRENGTH) for n in NAMES]
            entry = [geometric_mean([m.predict_proba(inputs.take(some)) for m in models])
                     for some in (rest[folds == fold], held)]  # fmt: skip
            out_of_fold[folds == fold] = entry[0]
            mean[held] += entry[1] / 5
            single.append(log_loss(labels[held], entry[1]))
        fitted = fit_calibration(labels[rest], out_of_fold)
        calibrated[held] = fitted.apply(mean[held])
        temperatures.append((fitted.temperature, fitted.tie_bias))
        print(f"tenth {tenth}: temperature {fitted.temperature:.3f}, tie bias {fitted.tie_bias:+.3f}", flush=True)
    own, suited = blend_out_of_fold(labels, [mean], tenths, groups), fit_calibration(labels, mean)
    print(f"{len(rows)} rows; models of one fold: {np.mean(single):.4f}; their mean: {log_loss(labels, mean):.4f}")
    print(
        "fitted on the models of one fold: temperature {:.3f}, tie bias {:+.3f}".format(*np.mean(temperatures, axis=0))
    )
    print(f"fitted on the means, all rows: temperature {suited.temperature:.3f}, tie bias {suited.tie_bias:+.3f}")
    for name, probs in (("fitted on the models of one fold", calibrated), ("fitted on the means, nested", own)):
        c = compare(labels, probs, mean, groups)
        print(f"calibration {name}: {log_loss(labels, probs):.4f}, {c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]")
    c = compare(labels, calibrated, own, groups)
    print(f"the first minus the second: {c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]")


if __name__ == "__main__":
    main(sys.argv[1])
