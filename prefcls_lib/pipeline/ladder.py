"""`prefcls ladder`: all baselines as a run of its own, with the files of any other run.

It predicts what `cross_validation.choose_entry` chooses. oof.csv holds each row's probabilities from what is chosen on
the other folds, so `log_loss` is not flattered by the choice. model/ and submission.csv are of what is chosen on all
rows. oof_baselines.csv has every baseline's out-of-sample probabilities.

With a reward model (`init_from`) its score is one baseline more, structure_reward; no other command fits that, since it
takes a pass over all rows. If it is chosen, the reward model is saved beside the folds, as model/reward.
"""

import time
from dataclasses import replace

import numpy as np
import pandas as pd

from prefcls_lib.baselines.columns import REWARD_BASELINE
from prefcls_lib.baselines.cross_validation import choose_entry, cross_validate, ladder_table
from prefcls_lib.baselines.estimators import BASELINES, KNOWN_BASELINES
from prefcls_lib.baselines.offset import BaselineMean
from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import write_submission
from prefcls_lib.models.saved import load_scorer, save_model
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, prediction_table, write_table
from prefcls_lib.pipeline.job import open_folder, read_job
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.pipeline.results import score_job
from prefcls_lib.runtime.files import write_json, write_whole


def run_ladder_job(config: RunConfig) -> RunFolder:
    """Fit every baseline on the folds of `config`, write the run folder; on a complete one, only say so.

    Of the settings only those of rows and folds matter (max_train_rows, num_folds, folds, fold_seed, extra_train), and
    with a reward model init_from and those of its texts.

    Raises:
        UserError: see `job.read_job` and `job.open_folder`.
    """
    config = replace(config, backbone="ladder", num_seeds=1, start_from="none")
    scorer = None if config.init_from is None else load_scorer(config)
    job = open_folder(read_job(config))
    folder = job.folder
    if folder.complete:
        print(f"{folder.path}: this run is complete; for a new one name another --out.", flush=True)
        return folder
    labels, groups = job.rows["label"].to_numpy(), job.rows["group"].to_numpy()
    names = BASELINES if scorer is None else KNOWN_BASELINES
    if scorer is not None:
        rows, extra = (
            None if table is None else scorer.add_margins(table, "reward model") for table in (job.rows, job.extra_rows)
        )
        job = replace(job, rows=rows, extra_rows=extra)
    plan = (job.folds, job.config.folds, job.config.fold_seed)
    results = cross_validate(names, job.rows, *plan, extra=job.extra_rows)
    entry, cross_fitted, naive = choose_entry(results, labels, groups, job.folds)
    for fold, *baselines in zip(job.config.folds, *(results[name].baselines for name in entry), strict=True):
        write_whole(folder.model_folder(FoldModel(fold)), BaselineMean(tuple(baselines)).save)
    if REWARD_BASELINE in entry:
        write_whole(
            folder / "model" / "reward",
            lambda temporary: save_model(temporary, scorer.model, scorer.backbone, None, config),
        )

    def predictions(probs: np.ndarray) -> pd.DataFrame:
        return prediction_table(job.rows[job.validated], job.folds[job.validated], probs[job.validated])

    write_table(folder / "oof.csv", predictions(cross_fitted))
    write_table(folder / "valid.csv", predictions(naive).assign(group=groups[job.validated]))
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
        "ladder_entry": entry,
        "ladder": table.to_dict(orient="records"),
        "seconds": time.perf_counter() - job.started,
    }
    result |= dict.fromkeys(
        ("best_epoch", "useful_token_share", "predict_useful_token_share", "tokens_per_second"), None
    )
    write_json(folder / "result.json", result)
    return folder
