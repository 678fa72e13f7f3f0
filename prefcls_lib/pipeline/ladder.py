"""`prefcls ladder`: all baselines as a run of its own, with the files of any other run.

It predicts what the ensemble does. oof_baselines.csv has every baseline's out-of-sample probabilities.
"""

import time
from dataclasses import replace

import numpy as np
import pandas as pd

from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import write_submission
from prefcls_lib.pipeline.cross_validation import cross_validate, ladder_table
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, prediction_table, write_table
from prefcls_lib.pipeline.job import open_folder, read_job
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.pipeline.results import score_job
from prefcls_lib.runtime.files import write_json, write_whole


def run_ladder_job(config: RunConfig) -> RunFolder:
    """Fit every baseline on the folds of `config`, write the run folder; on a complete one, only say so.

    Of the settings only those of rows and folds matter (max_train_rows, num_folds, folds, fold_seed, extra_train).

    Raises:
        UserError: see `job.read_job` and `job.open_folder`.
    """
    config = replace(config, backbone="ladder", num_seeds=1, start_from="none")
    job = open_folder(read_job(config))
    folder = job.folder
    if folder.complete:
        print(f"{folder.path}: this run is complete; for a new one name another --out.", flush=True)
        return folder
    labels, groups = job.rows["label"].to_numpy(), job.rows["group"].to_numpy()
    plan = (job.folds, job.config.folds, job.config.fold_seed)
    results = cross_validate(job.rows, *plan, extra=job.extra_rows)
    for fold, baseline in zip(job.config.folds, results[ENSEMBLE].baselines, strict=True):
        write_whole(folder.model_folder(FoldModel(fold)), baseline.save)

    def predictions(probs: np.ndarray) -> pd.DataFrame:
        return prediction_table(job.rows[job.validated], job.folds[job.validated], probs[job.validated])

    write_table(folder / "oof.csv", predictions(results[ENSEMBLE].probs))
    write_table(folder / "valid.csv", predictions(results[ENSEMBLE].probs).assign(group=groups[job.validated]))
    everything = [predictions(result.probs).assign(rung=name) for name, result in results.items()]
    write_table(folder / "oof_baselines.csv", pd.concat(everything))
    table = ladder_table(results, labels, groups)
    write_table(folder / "history.csv", table)
    probs, _ = predict_run(folder, job.test_rows, job.config.num_processes)
    write_submission(folder / "submission.csv", list(job.test_rows[ID]), probs)
    scores = score_job(job)
    result = {
        **scores,
        "ladder_log_loss": scores["log_loss"],
        "ladder_entry": [ENSEMBLE],
        "ladder": table.to_dict(orient="records"),
        "seconds": time.perf_counter() - job.started,
    }
    result |= dict.fromkeys(
        ("best_epoch", "useful_token_share", "predict_useful_token_share", "tokens_per_second"), None
    )
    write_json(folder / "result.json", result)
    return folder
