"""How much of a log loss is the fold plan's? structure_logistic on the shipped rows, five folds, 60 other plans.

    python -m report.studies.fold_plans             20 seconds; writes report/studies/fold_plans.json

Only the plan changes: rows, baseline and the seed of its inner folds stay.
"""

from pathlib import Path

import numpy as np

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.runtime.files import write_json

NAME = "structure_logistic"
NUM_FOLDS = 5
SHIPPED_SEED = RunConfig().seed
PLAN_SEEDS = [seed for seed in range(61) if seed != SHIPPED_SEED]
OUT = Path(__file__).with_suffix(".json")


def score_plans(seeds: list[int]) -> list[float]:
    """Log loss of the shipped rows, each predicted by a baseline that was not fitted on its fold, for each plan."""
    rows = read_rows(sample_path("train"), labelled=True)
    labels, groups, inputs = rows["label"].to_numpy(), rows["group"].to_numpy(), read_inputs(rows, with_text=False)
    losses = []
    for seed in seeds:
        folds = assign_folds(rows, NUM_FOLDS, seed)
        probs = np.empty((len(rows), NUM_CLASSES))
        for fold in range(NUM_FOLDS):
            train, valid = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            baseline, _ = fit_out_of_fold(NAME, inputs.take(train), labels[train], groups[train], SHIPPED_SEED)
            probs[valid] = baseline.predict_proba(inputs.take(valid))
        losses.append(log_loss(labels, probs))
    return losses


def summarise(shipped: float, losses: list[float]) -> dict:
    """The shipped plan's log loss beside the others', in numbers and in the sentence for report and README."""
    mean, deviation = float(np.mean(losses)), float(np.std(losses, ddof=1))
    share = float(np.mean(np.array(losses) < shipped))
    sentence = (
        f"The result depends on the folds: with {len(losses)} other plans, {NAME} has a mean log loss of {mean:.4f} on "
        f"these rows (standard deviation {deviation:.4f}); the plan used here gives {shipped:.4f}, worse than "
        f"{100 * share:.0f} % of them."
    )
    return {
        "baseline": NAME, "num_folds": NUM_FOLDS, "shipped_seed": SHIPPED_SEED, "shipped_log_loss": shipped,
        "plans": len(losses), "mean": mean, "standard_deviation": deviation, "share_lower": share,
        "sentence": sentence, "log_losses": losses,
    }  # fmt: skip


def main() -> None:
    """Score the plans, print, write."""
    shipped, *losses = score_plans([SHIPPED_SEED, *PLAN_SEEDS])
    result = summarise(shipped, losses)
    write_json(OUT, result)
    print({name: value for name, value in result.items() if name != "log_losses"})


if __name__ == "__main__":
    main()
