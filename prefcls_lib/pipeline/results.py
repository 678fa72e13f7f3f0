"""What is said of a run. Before it: settings and time; after it: result.json, the model card, tables, a verdict."""

import math
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

import prefcls_lib
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import TokenCount
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import blend_cross_fitted
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides
from prefcls_lib.models.recipes import HUB_NAMES
from prefcls_lib.pipeline.folder import LADDER, fold_models, read_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime.devices import machine_name, make_accelerator, versions
from prefcls_lib.runtime.files import write_text

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TOKENISED_ROWS = 200  # that are tokenised for the mean length of a row
TIMED_ROWS = 4  # of these, whose forward pass is timed
BACKWARD = 2.0  # a backward pass costs as much as so many forward passes
BASELINE_SECONDS = 0.004  # of reading and fitting a row, for each fold: 210 CPU seconds for 57,477 (report/log.md)


def describe_duration(job: Job, model: PreferenceModel) -> str:
    """One sentence on the time that a run needs: a rough estimate, from the forward pass of a few rows."""
    config, num_folds, num_rows = job.config, len(job.config.folds), len(job.table) - len(job.test_rows)
    texts = (config.max_length, config.text_cleaning, config.architecture)
    examples = encode_rows(job.rows.head(TOKENISED_ROWS), job.backbone.tokenizer, *texts)
    row_tokens = examples.lengths.sum(axis=1)
    near = np.argsort(np.abs(row_tokens - row_tokens.mean()), kind="stable")[:TIMED_ROWS]
    accelerator = make_accelerator(config.mixed_precision)
    model.to(accelerator.device)
    for _ in range(2):  # the first loads kernels
        started = time.perf_counter()
        embeddings, tokens = embed_unique_sides(model, examples.take(near), accelerator)
        embeddings.sum().item()  # waits for the GPU
    seconds_per_row = (time.perf_counter() - started) / tokens.computed * row_tokens.mean()
    valid = job.table["fold"].isin(config.folds).sum() / num_folds
    train = (num_rows - valid) * (1 + BACKWARD) / (2 if config.architecture == "cross" else 1)  # one of its two orders
    passes = config.num_epochs * (train + config.validations_per_epoch * valid) + len(job.test_rows)
    models = num_folds * config.num_seeds / count_processes(config.num_processes)  # that each process trains
    seconds = BASELINE_SECONDS * num_rows * num_folds + passes * seconds_per_row * models
    hours = config.time_budget_hours
    amount = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{math.ceil(seconds / 60)} min"
    budget = f"; time_budget_hours={hours:g} cuts it" if hours is not None and seconds > 3600 * hours else ""
    return f"this run will take about {amount} on this machine ({machine_name()}){budget}"


def settings_table(given: RunConfig, filled: RunConfig) -> pd.DataFrame:
    """The settings of a run: first those that were given, then those of the backbone's recipe, then the defaults."""
    default, given, filled = (config.to_dict() for config in (RunConfig(), given, filled))
    kinds = ["set for this run", "from the backbone's recipe", "default"]
    kind = {name: kinds[0] if given[name] != default[name] else kinds[1 if filled[name] != given[name] else 2]
            for name in filled}  # fmt: skip
    table = pd.DataFrame({"value": pd.Series(filled, dtype=object).map(str), "where from": pd.Series(kind)})
    return table.sort_values("where from", key=lambda column: column.map(kinds.index), kind="stable")


def baseline_table(predictions: pd.DataFrame) -> pd.DataFrame:
    """A line a baseline: log_loss, low, high (95 % interval), accuracy, seconds; of out-of-sample predictions."""
    lines = []
    for name, table in predictions.groupby("model", sort=False):
        labels, probs = table["label"].to_numpy(), table[list(LABEL_COLUMNS)].to_numpy()
        losses = scores.row_losses(labels, probs)
        low, high = compare.bootstrap_interval(losses, table["group"].to_numpy())
        seconds = table.groupby("fold")["seconds"].first().sum()  # all baselines of a fold are fitted together
        lines.append({"model": name, "log_loss": losses.mean(), "low": low, "high": high,
                      "accuracy": scores.accuracy(labels, probs), "seconds": seconds})  # fmt: skip
    return pd.DataFrame(lines).set_index("model")


def describe_run(job: Job, records: list[dict]) -> dict:
    """The content of result.json, from the tables of the run and fold.json of every model. No log loss is smoothed.

    `calibrated_log_loss` has temperature and tie bias fitted on rows of other prompts.
    """
    oof, predictions = (read_table(job.folder / name) for name in ("oof.csv", "oof_baselines.csv"))
    start = predictions[predictions["model"] == job.baseline_name]  # the rows of oof, in their order
    probs, start_probs = (table[list(LABEL_COLUMNS)].to_numpy() for table in (oof, start))
    network = job.config.backbone != LADDER
    labels, groups, folds = (oof[name].to_numpy() for name in ("label", "group", "fold"))
    calibrated = blend_cross_fitted(labels, [probs], groups)
    result = {
        **compare.score_predictions(labels, probs, groups, folds),
        "calibrated_log_loss": scores.log_loss(labels, calibrated),
        "calibrated_expected_calibration_error": scores.expected_calibration_error(labels, calibrated),
        "baseline": job.baseline_name,
        "baseline_log_loss": scores.log_loss(labels, start_probs),
        "encoder_share": compare.compare(labels, probs, start_probs, groups).to_dict() if network else None,
        "baselines": baseline_table(predictions).reset_index().to_dict(orient="records"),
        "rows": len(job.rows),
        "valid_rows": len(oof),
        "backbone": job.config.init_from or job.config.backbone,
        "seed": job.config.seed,
        "seconds": _total_seconds(job, records),
        "versions": versions(),
        "data_sha256": job.data_sha256,
        "folds": records,
    }
    if not network:
        shares = ("useful_token_share", "predict_useful_token_share")
        return result | dict.fromkeys([*shares, "tokens_per_second", "seconds_before_training", "best_epoch"])
    of = pd.DataFrame(records)
    tokens, predicted = (TokenCount(*np.sum(of[name].tolist(), axis=0)) for name in ("tokens", "predicted_tokens"))
    of_seeds = [np.average(fits["log_loss"], weights=fits["valid_rows"]) for _, fits in of.groupby("seed")]
    warnings = zip(fold_models(job.config), of["encoder_warning"], strict=True)
    return result | {
        "log_loss_seed_sd": float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else None,
        "encoder_only_log_loss": float(np.average(of["encoder_log_loss"], weights=of["valid_rows"])),
        "encoder_warnings": {name: warning for name, warning in warnings if warning},
        "flip_rate": float(np.average(of["flip_rate"], weights=of["valid_rows"])),
        "useful_token_share": tokens.useful_share,
        "predict_useful_token_share": predicted.useful_share,
        "tokens_per_second": tokens.real / sum(of["step_seconds"]),
        "seconds_before_training": min(of["seconds_before_training"]),
        "best_epoch": float(np.mean(of["best_epoch"])),
    }


def _total_seconds(job: Job, records: list[dict]) -> float:
    """Seconds in which this session or a fit of an earlier one worked; what ran side by side counts once."""
    spans = [(r["finished_at"] - r["seconds"], r["finished_at"]) for r in records]
    starts, ends = np.array(sorted([(job.started_at, time.time()), *spans])).T
    covered = np.maximum.accumulate(ends)
    return float(np.maximum(0, covered - np.maximum(starts, [-math.inf, *covered[:-1]])).sum())


def write_card(place: Path, config: RunConfig, result: dict) -> None:
    """Write the model card of a run folder or a model folder: card.md beside this file, filled in, as README.md."""
    name, baseline, share = result["backbone"], result["baseline"], result["encoder_share"]
    what, base, comparison = f"the baseline {baseline}, without a network", "", ""
    if share:
        base = MINILM if name == "minilm" else HUB_NAMES.get(name, name)
        what = f"a network on {base} that corrects the baseline {baseline}"
        told = compare.Comparison.from_dict(share).describe()
        comparison = f"Its baseline has {result['baseline_log_loss']:.4f}: with the network it is {told}.\n"
    default, hidden = RunConfig().to_dict(), ("train", "test", "out", "resume_from")
    changed = [f"- `{k}: {v}`" for k, v in config.to_dict().items() if v != default[k] and k not in hidden]
    card = (resources.files(__package__) / "card.md").read_text(encoding="utf-8").format(
        base_model=f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).exists() else "",
        folder=place.resolve().name, version=prefcls_lib.__version__, what=what, comparison=comparison,
        exactly=", exactly" if config.head == "symmetric" else " only about: this head reads one order of them",
        settings="\n".join(changed) or "- none", licence=f"The licence of {base} holds, too." if base else "", **result,
    )  # fmt: skip
    write_text(place / "README.md", card)


def result_table(result: dict) -> pd.DataFrame:
    """The baselines and the network of one result.json, one line each, with 95 % intervals."""
    low, high = result["log_loss_interval"]
    network = {"model": f"network: {Path(result['backbone']).name}", "low": low, "high": high}
    network |= {name: result[name] for name in ("log_loss", "accuracy", "seconds")}
    return pd.DataFrame([*result["baselines"], *([network] if result["encoder_share"] else [])]).set_index("model")


def verdict(result: dict) -> str:
    """What the encoder changes in the baseline, and what to try next."""
    if result["encoder_share"] is None:
        return f"{result['baseline']}: log loss {result['log_loss']:.4f} on {result['valid_rows']} validation rows"
    c = compare.Comparison.from_dict(result["encoder_share"])
    line = (
        f"network {c.against(result['baseline'])} ({result['baseline_log_loss']:.4f}): with the encoder, the log loss "
        f"is {c.describe()} on {c.rows} validation rows; a difference of {c.smallest_detectable:.4f} would be found in "
        "80 % of such samples"
    )
    warnings = [f"{name}: the encoder does not contribute: {why}" for name, why in result["encoder_warnings"].items()]
    ideas = [(warnings or result["rows"] < 5_000, "train on more rows (`extra_train`; `max_train_rows` if set)"),
             (c.verdict == "INCONCLUSIVE", "validate on more rows (`folds`)"),
             (c.verdict == "LOSES", "stop earlier (`num_epochs`) or lower the `learning_rate`"),
             (c.verdict == "BEATS", "train a second seed (`num_seeds`), and blend with `prefcls ladder`"),
             (result["calibrated_log_loss"] < result["log_loss"] - 0.001, "calibrate: `prefcls blend`")]  # fmt: skip
    time_spent = f"{result['seconds_before_training']:.0f} of {result['seconds']:.0f} seconds passed before training."
    advice = f"What to try next: {'; '.join(idea for holds, idea in ideas if holds)}."
    return "\n".join([line, time_spent, *warnings, advice])
