"""What result.json says of a run: scores of its out-of-sample predictions, the comparison with the baselines."""

from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation import metrics
from prefcls_lib.evaluation.calibration import calibrate_out_of_fold
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.devices import versions
from prefcls_lib.runtime.files import UserError


def read_out_of_sample(job: Job, table: str = "oof.csv") -> tuple[pd.DataFrame, np.ndarray]:
    """The validated rows of a finished run and their out-of-sample probabilities (N, 3).

    Args:
        job: of the run.
        table: "oof.csv", honest about selection; "valid.csv", what the saved models predict.
    """
    rows = job.rows[job.validated].reset_index(drop=True)
    found = read_table(job.folder / table).set_index(ID)
    if len(found) != len(rows) or set(found.index) != set(rows[ID]):
        raise UserError(
            f"{job.folder / table}: does not hold this run's validation rows. Delete the run folder and run again."
        )
    return rows, found.loc[list(rows[ID]), list(LABEL_COLUMNS)].to_numpy()


def score_job(job: Job) -> dict:
    """What result.json says of any run's out-of-sample predictions, networks and ladder alike.

    All log losses are unsmoothed. `log_loss` is honest about selection, `log_loss_naive` is not;
    `calibrated_log_loss` has temperature and tie bias fitted on other folds (on one fold: on the other half of its
    prompt groups).
    """
    rows, probs = read_out_of_sample(job)
    _, naive = read_out_of_sample(job, "valid.csv")
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    calibrated = calibrate_out_of_fold(labels, probs, job.folds[job.validated], groups)
    return {
        "log_loss": metrics.log_loss(labels, probs),
        "log_loss_interval": list(metrics.bootstrap_interval(metrics.row_losses(labels, probs), groups)),
        "log_loss_naive": metrics.log_loss(labels, naive),
        "accuracy": metrics.accuracy(labels, probs),
        "brier_score": metrics.brier_score(labels, probs),
        "expected_calibration_error": metrics.expected_calibration_error(labels, probs),
        "reliability": metrics.reliability_table(labels, probs).to_dict(orient="records"),
        "calibrated_log_loss": metrics.log_loss(labels, calibrated),
        "calibrated_expected_calibration_error": metrics.expected_calibration_error(labels, calibrated),
        "rows": len(job.rows),
        "valid_rows": len(rows),
        "test_rows": len(job.test_rows),
        "backbone": job.config.init_from or job.config.backbone,
        "seed": job.config.seed,
        "versions": versions(),
        "data_sha256": job.data_sha256,
    }


def result_table(result: dict) -> pd.DataFrame:
    """The ladder's baselines and the network of one result.json, one line each, with 95 % intervals."""
    network = {
        "rung": f"network: {Path(result['backbone']).name}",
        "log_loss": result["log_loss"],
        "low": result["log_loss_interval"][0],
        "high": result["log_loss_interval"][1],
        "accuracy": result["accuracy"],
        "seconds": result["seconds"],
    }
    return pd.DataFrame([*result["ladder"], network]).rename(columns={"rung": "model"}).set_index("model")


def verdict(result: dict) -> str:
    """The network against the best baseline, and what the encoder adds to the baseline that it starts from."""
    c = result["comparison"]
    lines = [
        f"network {c['verdict']} {result['ladder_best']}: log loss {_difference(c)} on {c['rows']} validation rows; "
        f"minimum detectable effect {c['smallest_detectable']:.4f} (80 % power)"
    ]
    if "encoder_share" in result:  # else of an earlier version
        added = _difference(result["encoder_share"])
        lines.append(f"the encoder adds {added} to its baseline's {result['baseline_log_loss']:.4f}")
        warnings = result["encoder_warnings"].items()
        lines += [f"{name}: the encoder does not contribute: {why}" for name, why in warnings]
    return "\n".join(lines)


def _difference(comparison: dict) -> str:
    return f"{comparison['difference']:+.4f}, 95 % interval [{comparison['low']:+.4f}, {comparison['high']:+.4f}]"
