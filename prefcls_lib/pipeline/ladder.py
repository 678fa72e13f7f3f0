"""`prefcls ladder`: all baselines as a run of its own, with the files of any other run.

oof.csv holds each row's probabilities from the baseline that was best on the other half of the prompt groups, so
`log_loss` is not flattered by the choice of one in seven. model/ and submission.csv are the baseline best on all rows.
"""

import time
from dataclasses import replace

from prefcls_lib.baselines.cross_validation import choose_baseline, cross_validate, ladder_table
from prefcls_lib.baselines.estimators import BASELINES, save_baseline
from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import write_submission
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, prediction_table, write_table
from prefcls_lib.pipeline.job import open_folder, read_job
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.pipeline.results import score_job
from prefcls_lib.runtime.files import write_json, write_whole


def run_ladder_job(config: RunConfig) -> RunFolder:
    """Fit every baseline on the folds of `config`, write the run folder; on a complete one, only say so.

    Of the settings only those of rows and folds matter: max_train_rows, num_folds, folds, seed.

    Raises:
        UserError: see `job.read_job` and `job.open_folder`.
    """
    job = open_folder(read_job(replace(config, backbone="ladder", num_seeds=1, start_from="none")))
    folder = job.folder
    if folder.complete:
        print(f"{folder.path}: this run is complete; for a new one name another --out.", flush=True)
        return folder
    labels, groups = job.rows["label"].to_numpy(), job.rows["group"].to_numpy()
    results = cross_validate(BASELINES, job.rows, job.folds, job.config.folds, job.config.seed)
    best, cross_fitted = choose_baseline(results, labels, groups)
    for fold, baseline in zip(job.config.folds, results[best].baselines, strict=True):
        write_whole(
            folder.model_folder(FoldModel(fold)),
            lambda temporary, baseline=baseline: save_baseline(baseline, temporary),
        )
    validated = job.rows[job.validated]
    folds = job.folds[job.validated]
    saved = prediction_table(validated, folds, results[best].probs[job.validated])
    write_table(folder / "oof.csv", prediction_table(validated, folds, cross_fitted[job.validated]))
    write_table(folder / "valid.csv", saved.assign(group=groups[job.validated]))
    table = ladder_table(results, labels, groups)
    write_table(folder / "history.csv", table)
    probs, _ = predict_run(folder, job.test_rows, job.config.num_processes)
    write_submission(folder / "submission.csv", list(job.test_rows[ID]), probs)
    scores = score_job(job)
    result = {
        **scores,
        "ladder_log_loss": scores["log_loss"],
        "ladder_best": best,
        "ladder": table.to_dict(orient="records"),
        "seconds": time.perf_counter() - job.started,
    }
    result |= dict.fromkeys(
        ("best_epoch", "useful_token_share", "predict_useful_token_share", "tokens_per_second"), None
    )
    write_json(folder / "result.json", result)
    return folder
