"""The main job in the order of its steps, which the command line and the notebooks both call.

job = start(config)              everything that can be wrong is found here; a prior submission is in place
baselines = fit_baselines(job)   plain models on the same folds: what the networks start from
job = prepare(job)               token ids of all rows, written once
fit_folds(job)                   one model for each fold and seed, saved when it is done; on several GPUs side by side
result = finish(job)             submission.csv, the tables, result.json
"""

import shutil
from dataclasses import replace
from pathlib import Path

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID
from prefcls_lib.models.backbones import load_backbone, set_gradient_checkpointing
from prefcls_lib.models.saved import build_model
from prefcls_lib.pipeline import folder as run_files
from prefcls_lib.pipeline import job as job_steps
from prefcls_lib.pipeline.folds import train_models
from prefcls_lib.pipeline.job import Job, open_folder, read_job
from prefcls_lib.pipeline.launch import count_processes, run_workers
from prefcls_lib.pipeline.results import describe_duration, describe_run, write_card
from prefcls_lib.runtime.devices import begin_tracking, make_accelerator, track
from prefcls_lib.runtime.files import read_json, write_json, write_whole


def start(config: RunConfig) -> Job:
    """Check files, settings, folds and the backbone; open the run folder; put the prior's submission in it.

    Whatever is wrong is a UserError, before any time is spent.
    """
    job = read_job(config)
    backbone = load_backbone(config.init_from or config.backbone, config.max_length)
    make_accelerator(config.mixed_precision, config.report_to, job.folder / "logs")
    if (job.folder / "config.json").exists():  # the weights were loaded when the folder was opened first
        return open_folder(job, backbone)
    model = build_model(backbone.path, config)
    set_gradient_checkpointing(model.encoder, config.gradient_checkpointing)
    job = open_folder(job, backbone)
    print(describe_duration(job, model), flush=True)
    return job


fit_baselines = job_steps.fit_baselines
prepare = job_steps.prepare


def fit_folds(job: Job) -> None:
    """Train the models of the run that are not done yet; one that was interrupted resumes from its checkpoint.

    On several GPUs (or with `num_processes`) several models are trained side by side, one in a process; a single one by
    all processes together. After SIGTERM, the state of the models in training is saved, and `Stopped` is raised.
    """
    models, num_processes = run_files.fold_models(job.config), count_processes(job.config.num_processes)
    left = [name for name in models if not (job.folder / "model" / name).is_dir()]
    if done := ", ".join(name for name in models if name not in left):
        print(f"{done}: done before, kept in {job.folder / 'model'}", flush=True)
    processes = num_processes if len(left) == 1 else min(num_processes, len(left))
    if processes > 1:
        given = ["--started-at", str(job.started_at), str(job.folder), *left]
        run_workers(processes, ["-m", "prefcls_lib", "fit", *given])
    else:
        train_models(job, left)


def finish(job: Job) -> dict:
    """Write submission, tables and, last, result.json, from what the models have left; return its content."""
    folder, models = job.folder, run_files.model_folders(job.folder)
    for name in ("history.csv", "oof.csv"):
        run_files.write_table(folder / name, run_files.gather_table(models, name))
    run_files.write_mean(folder, job.test_rows[ID], models)
    result = describe_run(job, [read_json(model / "fold.json") for model in models])
    for place in (folder, *models):
        write_card(place, job.config, result)
    accelerator = make_accelerator("no", job.config.report_to, folder / "logs")
    begin_tracking(accelerator, job.config.to_dict(), folder.name)
    track(accelerator, result)
    accelerator.end_training()
    write_json(folder / "result.json", result)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return result


def run(config: RunConfig, network: bool = True) -> Path:
    """All steps; on a folder whose run is complete, only says so.

    Without a network (`prefcls ladder`) the models are the folds' baselines, in the files of any other run. Of the
    settings only `start_from` and those of rows and folds matter then; history.csv is empty.
    """
    ladder = {"backbone": run_files.LADDER, "init_from": None, "num_seeds": 1}
    job = start(config) if network else open_folder(read_job(replace(config, **ladder)))
    if (job.folder / "result.json").is_file():
        print(f"{job.folder}: this run is complete; for a new one name another --out.", flush=True)
        return job.folder
    fit_baselines(job)
    if network:
        fit_folds(prepare(job))
    else:
        for name in run_files.fold_models(job.config):  # the folds' baselines become the models of the run
            with write_whole(job.folder / "model" / name) as model:
                shutil.copytree(job.folder / "checkpoint" / f"baseline-{name}" / "model", model)
    finish(job)
    return job.folder
