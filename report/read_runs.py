"""Run folders and blends, as the report reads them: a broken one is named and left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefcls_lib.ensemble.blend import MIN_SHARED_ROWS, shared_ids
from prefcls_lib.ensemble.finished import Run, read_run
from prefcls_lib.evaluation import compare
from prefcls_lib.runtime.files import UserError, read_json, reading


@dataclass(frozen=True)
class Found:
    """What was found in the places that were named."""

    runs: list[Run]
    blends: list[tuple[str, Path, dict]]  # name, file, content, whose numbers are tried when the page is made
    left_out: list[tuple[str, str]]  # what, why


def read_runs(places: Sequence[Path]) -> Found:
    """Read every run folder and blend.json that is, or is in, one of `places`; one that is not there is a UserError."""
    found = Found([], [], [])
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"--runs {place}: no such folder. Name a run folder, or a folder of run folders.")
        inside = sorted(path for path in Path(place).iterdir() if path.is_dir() and not path.name.startswith("."))
        folders = [Path(place)] if (Path(place) / "config.json").exists() else inside
        for path in [*folders, *sorted(Path(place).glob("blend*.json"))]:
            try:
                with reading(path, "Copy the run folder, or blend the runs, again."):
                    if path.is_dir():
                        found.runs.append(read_run(path))
                        continue
                    content = read_json(path)
                    content["runs"] = [(path.parent / run).resolve() for run in content["runs"]]
                    if not content["runs"]:
                        raise ValueError("it names no run")
                    content["comparison"] = compare.Comparison.from_dict(content["comparison"])
                    found.blends.append((path.stem, path, content))
            except UserError as error:
                found.left_out.append((str(path), str(error)))
    return found


def compare_runs(one: Run, other: Run) -> compare.Comparison | None:
    """Paired comparison on the rows that both predicted out of sample; None where they share too few."""
    ids = shared_ids((one, other))
    rows = one.oof.loc[ids]
    if one.group != other.group or len(ids) < MIN_SHARED_ROWS or rows["group"].nunique() < 2:
        return None
    return compare.compare(rows["label"].to_numpy(), one.probs(ids), other.probs(ids), rows["group"].to_numpy())
