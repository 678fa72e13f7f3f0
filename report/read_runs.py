"""Run folders and blends, as the report reads them: a broken one is named and left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prefcls_lib.data.loading import sample_path
from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.blend import Run, read_run
from prefcls_lib.evaluation import compare
from prefcls_lib.runtime.files import UserError, read_json, reading, sha256, shown

# what the page shows of a blend, of a run, of a network, and of each if it is there
OF_BLENDS = ("log_loss", "accuracy", "expected_calibration_error", "expected_calibration_error_if_calibrated")
OF_RUNS = (*OF_BLENDS, "calibrated_log_loss", "calibrated_expected_calibration_error", "baseline_log_loss", "seconds",
           "rows", "valid_rows")  # fmt: skip
OF_NETWORKS = (*OF_RUNS, "best_epoch", "tokens_per_second", "useful_token_share", "predict_useful_token_share")
OPTIONAL = ("log_loss_fold_sd", "log_loss_seed_sd", "encoder_only_log_loss", "flip_rate")


@dataclass(frozen=True)
class Found:
    """What was found in the places that were named."""

    runs: list[Run]
    blends: list[tuple[str, dict]]  # name, content
    left_out: list[tuple[str, str]]  # what, why


def read_runs(places: Sequence[Path], rows: pd.DataFrame) -> Found:
    """Read every run folder and blend.json that is, or is in, one of `places`; one that is not there is a UserError.

    `rows`: the shipped training rows, which a run on them must have validated.
    """
    found, labels, shipped = Found([], [], []), rows.set_index(ID)["label"], sha256(sample_path("train"))
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"--runs {place}: no such folder. Name a run folder, or a folder of run folders.")
        inside = sorted(path for path in Path(place).iterdir() if path.is_dir() and not path.name.startswith("."))
        folders = [Path(place)] if (Path(place) / "config.json").exists() else inside
        for path in [*folders, *sorted(Path(place).glob("blend*.json"))]:
            try:
                with reading(path, "Copy the run folder, or blend the runs, again."):
                    if path.is_file():
                        found.blends.append((path.stem, _read_blend(path)))
                        continue
                    run = read_run(path)
                    texts = [run.group[0], run.result["baseline"], run.result.get("versions", {}).get("machine", "")]
                    _check(run.result, run.share, OF_NETWORKS if run.share else OF_RUNS, texts)
                    if run.group[0] == shipped and not run.oof["label"].equals(labels.reindex(run.oof.index)):
                        raise ValueError("oof.csv has other ids or labels than the shipped rows")
                    found.runs.append(run)
            except UserError as error:
                found.left_out.append((str(path), str(error)))
    return found


def _read_blend(path: Path) -> dict:
    content = read_json(path)
    content["runs"] = [(path.parent / run).resolve() for run in content["runs"]]
    content["comparison"] = compare.Comparison.from_dict(content["comparison"])
    _check(content, content["comparison"], OF_BLENDS, [content["runs"][content["best_run"]].name])
    return content


def _check(result: dict, share: compare.Comparison | None, names: Sequence[str], texts: Sequence[object]) -> None:
    """Raise where a value that the page shows is not of its kind."""
    low, high = result["log_loss_interval"]
    values = [low, high, *(result[name] for name in names), *(vars(share).values() if share else ())]
    values += [result[name] for name in OPTIONAL if result.get(name) is not None]
    for line in result.get("baselines", ()):
        values += [line[name] for name in ("log_loss", "low", "high", "accuracy")]
        texts = [*texts, line["model"]]
    if result.get("flip_rate") is not None:
        values.append(min(fold["flip_rate"] for fold in result["folds"]))
    wrong = [value for value in values if not isinstance(value, (int, float)) or not math.isfinite(value)]
    wrong += [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{shown(wrong)}: a number or a text is expected there")
