"""What result.json says of a run: scores of its out-of-sample predictions, the comparison with the baselines."""

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.data.batching import TokenCount
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import blend_out_of_fold
from prefcls_lib.pipeline.cross_validation import OutOfSample, ladder_table
from prefcls_lib.pipeline.folder import LADDER_ENTRY, fold_models, read_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.devices import load_average, versions
from prefcls_lib.runtime.files import UserError

TRY_NEXT = "To make an encoder contribute, train on more rows; extra_train adds those of other sets."


def read_out_of_sample(job: Job, table: str = "oof.csv") -> tuple[pd.DataFrame, np.ndarray]:
    """The validated rows of a finished run and their out-of-sample probabilities (N, 3).

    Args:
        job: of the run.
        table: "oof.csv", the best step of training chosen on other rows; "valid.csv", what the saved models predict.
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

    All log losses are unsmoothed. `log_loss` is cross-fitted: the step of training (of a ladder: the baselines) that
    predicts a row was chosen on other rows; for `log_loss_naive` it was chosen on the same rows. `calibrated_log_loss`
    has temperature and tie bias fitted on other folds (on one fold: on the other half of its prompt groups).
    """
    rows, probs = read_out_of_sample(job)
    _, naive = read_out_of_sample(job, "valid.csv")
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    calibrated = blend_out_of_fold(labels, [probs], job.folds[job.validated], groups)
    return {
        **compare.score_predictions(labels, probs, groups, job.folds[job.validated]),
        "log_loss_naive": scores.log_loss(labels, naive),
        "reliability": scores.reliability_table(labels, probs).to_dict(orient="records"),
        "calibrated_log_loss": scores.log_loss(labels, calibrated),
        "calibrated_expected_calibration_error": scores.expected_calibration_error(labels, calibrated),
        "rows": len(job.rows),
        "valid_rows": len(rows),
        "test_rows": len(job.test_rows),
        "backbone": job.config.init_from or job.config.backbone,
        "seed": job.config.seed,
        "versions": versions(),
        "load_average": [job.load_at_start, load_average()],  # of the machine, at the start and at the end
        "data_sha256": job.data_sha256,
    }


def describe_run(job: Job, ladder: dict[str, OutOfSample], records: list[dict], test_tokens: TokenCount) -> dict:
    """The content of a network run's result.json.

    Args:
        job: its tables written.
        ladder: the baselines on the same folds.
        records: fold.json of every model.
        test_tokens: of the prediction of the test rows.
    """
    rows, probs = read_out_of_sample(job)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    everything = job.rows["label"].to_numpy(), job.rows["group"].to_numpy()
    entry, table = [ENSEMBLE], ladder_table(ladder, *everything)
    entry_probs = ladder[ENSEMBLE].probs[job.validated]
    start_probs = entry_probs if job.config.start_from == "none" else ladder[job.config.start_from].probs[job.validated]
    tokens = sum((TokenCount(*record["tokens"]) for record in records), TokenCount())
    predicted = sum((TokenCount(*record["valid_tokens"]) for record in records), test_tokens)
    named = [(model.name, record) for model, record in zip(fold_models(job.config), records, strict=True)]
    alone = [record.get("encoder_log_loss") for record in records]  # of a fold of an earlier version: not known
    flips, sizes = ([record[name] for record in records] for name in ("flip_rate", "valid_rows"))
    losses = np.array([record.get("log_loss", np.nan) for record in records]).reshape(-1, job.config.num_seeds)
    of_seeds = np.average(losses, axis=0, weights=sizes[:: job.config.num_seeds])
    return {
        **score_job(job),
        "log_loss_seed_sd": float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 and np.isfinite(of_seeds).all() else None,
        "ladder_log_loss": scores.log_loss(labels, entry_probs),
        "ladder_entry": entry,
        "ladder": table.to_dict(orient="records"),
        "comparison": compare.compare(labels, probs, entry_probs, groups).to_dict(),
        "start_from": job.config.start_from,
        "encoder_share": compare.compare(labels, probs, start_probs, groups).to_dict(),
        "baseline_log_loss": scores.log_loss(labels, start_probs),
        "encoder_only_log_loss": None if None in alone else float(np.average(alone, weights=sizes)),
        "encoder_warnings": {
            name: record["encoder_warning"] for name, record in named if record.get("encoder_warning")
        },
        "flip_rate": float(np.average(flips, weights=sizes)),
        "useful_token_share": tokens.useful_share,
        "predict_useful_token_share": predicted.useful_share,
        "tokens_per_second": tokens.real / sum(record["step_seconds"] for record in records),
        "seconds": _total_seconds(job, records),
        "best_epoch": float(np.mean([record["best_epoch"] for record in records])),
        "folds": records,
    }


def _total_seconds(job: Job, records: list[dict]) -> float:
    """Seconds in which this session or a fit of an earlier one worked; what ran side by side counts once."""
    now = time.time()
    session = now - (time.perf_counter() - job.started)
    spans = [(session, now)]
    for record in records:  # one of an earlier version does not say when it ended: before this session
        end = record.get("finished_at", session)
        spans.append((end - record["seconds"], end))
    total, covered = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def result_table(result: dict) -> pd.DataFrame:
    """The ladder's baselines and the network of one result.json, one line each, with 95 % intervals."""
    low, high = result["log_loss_interval"]
    network = {"rung": f"network: {Path(result['backbone']).name}", "low": low, "high": high}
    network |= {name: result[name] for name in ("log_loss", "accuracy", "seconds")}
    return pd.DataFrame([*result["ladder"], network]).rename(columns={"rung": "model"}).set_index("model")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table of scores as text with the digits that they deserve on few rows: 1.084, 212 s."""
    columns = [name for name in ("log_loss", "low", "high", "accuracy") if name in table]
    shown = table.assign(**{name: table[name].map("{:.3f}".format) for name in columns})
    return shown.assign(seconds=table["seconds"].map(lambda s: f"{s:,.0f} s" if s >= 1 else "below 1 s"))


def verdict(result: dict) -> str:
    """The network against the ladder's entry, and what the encoder changes in the baseline that it starts from."""
    c = compare.Comparison.from_dict(result["comparison"])
    lines = [
        f"network {c.against(LADDER_ENTRY)}, chosen on other rows ({result['ladder_log_loss']:.4f}): log loss "
        f"{c.describe()} on {c.rows} validation rows; a difference of {c.smallest_detectable:.4f} would be found in "
        "80 % of such samples"
    ]
    if result.get("start_from", "none") != "none":
        share = compare.Comparison.from_dict(result["encoder_share"]).describe()
        start = f"{result['start_from']} alone ({result['baseline_log_loss']:.4f})"
        lines.append(f"with the encoder, the log loss is {share} than with {start}")
    warnings = result.get("encoder_warnings", {}).items()  # none in an earlier version's
    lines += [f"{name}: the encoder does not contribute: {why}" for name, why in warnings]
    return "\n".join([*lines, TRY_NEXT] if warnings else lines)


def conclusion(result: dict) -> str:
    """What a run showed and what to try next, as Markdown, computed from its result.json."""
    c = compare.Comparison.from_dict(result["comparison"])
    compared, start = [(LADDER_ENTRY, result["ladder_log_loss"], c)], f"{result['start_from']}, from which it starts"
    if result["start_from"] != "none" and math.isclose(result["baseline_log_loss"], result["ladder_log_loss"]):
        compared = [(f"the best of the baselines, {start}", result["baseline_log_loss"], c)]
    elif result["start_from"] != "none":
        compared.append((start, result["baseline_log_loss"], compare.Comparison.from_dict(result["encoder_share"])))
    said = {"BEATS": "is better than", "LOSES": "is worse than", "INCONCLUSIVE": "is not shown to differ from"}
    found = [f"On {c.rows:,} rows, the network has a log loss of {result['log_loss']:.3f}."]
    found += [f"It {said[one.verdict]} {other} ({loss:.3f}): its log loss is {one.describe()}."
              for other, loss, one in compared]  # fmt: skip
    if result["encoder_warnings"]:
        found.append(f"In {len(result['encoder_warnings'])} of {len(result['folds'])} models the encoder adds nothing.")
    ideas = [(result["rows"] < 5_000, f"train on more rows, because {result['rows']:,} teach an encoder little"),
             (c.verdict == "INCONCLUSIVE", "validate on more rows (`folds`), because with so many a difference of "
              f"{c.smallest_detectable:.3f} is found four times in five"),
             (c.verdict == "LOSES", "stop earlier (`num_epochs`) or lower the `learning_rate`"),
             (c.verdict == "BEATS", "train a second seed (`num_seeds`), and blend with `prefcls ladder`"),
             (result["calibrated_log_loss"] < result["log_loss"] - 0.001, "calibrate: `prefcls blend`")]  # fmt: skip
    return f"{' '.join(found)}\n\n**What to try next:** {'; '.join(idea for holds, idea in ideas if holds)}."
