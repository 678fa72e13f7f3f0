"""The main job in the order of its steps; the command line and the notebooks both call these and nothing else.

job = start(config)              everything that can be wrong is found here; a prior submission is in place
encoded = encode(job)            token ids of the training rows
ladder = run_ladder(job)         plain baselines on the same folds
fit_folds(job, encoded)          one model a fold (and seed), each saved when it is done; on several GPUs side by side
result = finish(job, ladder)     submission.csv, the tables, result.json
"""

import shutil
import time
from dataclasses import replace

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import write_submission
from prefcls_lib.data.tokenization import EncodedRows
from prefcls_lib.evaluation.calibration import geometric_mean
from prefcls_lib.models.backbones import load_backbone, set_gradient_checkpointing
from prefcls_lib.models.reward import check_reward_model
from prefcls_lib.models.saved import build_model
from prefcls_lib.pipeline.cross_validation import OutOfSample, cross_validate
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, fold_models
from prefcls_lib.pipeline.folds import fit_here
from prefcls_lib.pipeline.job import Job, open_folder, read_job
from prefcls_lib.pipeline.launch import count_processes, run_side_by_side, run_together
from prefcls_lib.pipeline.offsets import read_out_of_sample_baselines
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.pipeline.results import describe_run
from prefcls_lib.runtime.devices import make_accelerator, process_state
from prefcls_lib.runtime.files import read_json, write_json


def start(config: RunConfig) -> Job:
    """Check files, settings, folds and the backbone; open the run folder; put the prior's submission in it.

    Raises:
        UserError: whatever is wrong, before any time is spent.
    """
    job = read_job(config)
    backbone = load_backbone(config.init_from or config.backbone, config.max_length)
    if config.init_from is not None:
        check_reward_model(backbone.path, backbone.config)
    make_accelerator(config.mixed_precision)
    if not (job.folder / "config.json").exists():  # else the weights were loaded when the folder was opened first
        set_gradient_checkpointing(build_model(backbone.path, config).encoder, config.gradient_checkpointing)
    return open_folder(replace(job, backbone=backbone), backbone.recipe(config.recipe))


def encode(job: Job) -> EncodedRows:
    """Token ids of the training rows."""
    return job.encode(job.rows)


def run_ladder(job: Job) -> dict[str, OutOfSample]:
    """The plain baselines, fitted and scored on the folds of this run; one of them is what the networks start from.

    Where the run folder holds only the prior's submission, that of the best baselines takes its place.
    """
    start = {} if job.config.start_from == "none" else read_out_of_sample_baselines(job)
    seed, extra = job.config.fold_seed, job.extra_rows
    results = cross_validate(job.rows, job.folds, job.config.folds, seed, job.features, extra, list(start)) | start
    if job.wrote_prior:
        inputs = read_inputs(job.test_rows)
        probs = geometric_mean([one.predict_proba(inputs) for one in results[ENSEMBLE].baselines])
        write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    return results


def fit_folds(job: Job, encoded: EncodedRows) -> None:
    """Train the models of the run that are not done yet; one that was stopped resumes from its checkpoint.

    On several GPUs (or with `num_processes`) several models are trained side by side, one in a process; a single one by
    all processes together.

    Raises:
        Stopped: SIGTERM came; the state of what was under way is saved.
    """
    models = fold_models(job.config)
    left = [model for model in models if not job.folder.model_folder(model).is_dir()]
    if process_state().is_main_process:
        for model in sorted(set(models) - set(left)):
            print(f"{model.name}: done before, kept in {job.folder.model_folder(model)}", flush=True)
    num_processes = count_processes(job.config.num_processes)
    if left and num_processes > 1:
        started_at = time.time() - (time.perf_counter() - job.started)
        command, folder = ["fit", "--started-at", str(started_at)], str(job.folder.path)
        if len(left) == 1:
            run_together([*command, folder, left[0].name], num_processes)
        else:
            shares = [left[i::num_processes] for i in range(min(num_processes, len(left)))]
            names = [[model.name for model in share] for share in shares]
            command += ["--side-by-side", str(len(shares)), folder]
            run_side_by_side([[*command, *share] for share in names], [" ".join(share) for share in names])
    else:
        fit_here(job, encoded, left)


def fit_models(folder: RunFolder, names: list[str], started_at: float, side_by_side: int) -> None:
    """What a worker does: train some models of a run that was started at `started_at` (`time.time()`).

    `side_by_side`: workers that do so at the same time, each with models of its own.
    """
    config = RunConfig.from_mapping(read_json(folder / "config.json")["settings"])
    job = start(replace(config, out=str(folder.path)))
    job = replace(job, started=time.perf_counter() - (time.time() - started_at))
    fit_here(job, encode(job), [FoldModel.parse(name) for name in names], side_by_side)


def finish(job: Job, ladder: dict[str, OutOfSample]) -> dict:
    """Predict the test rows with the saved models; write submission, tables and, last, result.json.

    Returns:
        The content of result.json; nothing in processes other than the first.
    """
    probs, test_tokens = predict_run(job.folder, job.test_rows, job.config.num_processes)
    if not process_state().is_main_process:
        return {}
    records = job.folder.gather_tables(fold_models(job.config))
    write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    result = describe_run(job, ladder, records, test_tokens)
    write_json(job.folder / "result.json", result)
    shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)
    return result


def run(config: RunConfig) -> RunFolder:
    """All steps; on a folder whose run is complete, only says so.

    Started by torchrun or accelerate launch, every process calls this; the first alone writes.
    """
    with process_state().main_process_first():
        job = start(config)
    if job.folder.complete:
        print(f"{job.folder.path}: this run is complete; for a new one name another --out.", flush=True)
    else:
        encoded = encode(job)
        ladder = run_ladder(job) if process_state().is_main_process else {}
        fit_folds(job, encoded)
        finish(job, ladder)
        process_state().wait_for_everyone()
    return job.folder
