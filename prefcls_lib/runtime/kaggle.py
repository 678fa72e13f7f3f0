"""Kaggle's folders and limits, which no other module knows: attached inputs, the run folder, the session's age."""

import os
import zipfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from prefcls_lib.runtime.files import UserError, sha256

COMPETITION = "llm-classification-finetuning"
# Where Kaggle mounts an attached input below /kaggle/input: the layout of 2026, and the older one.
COMPETITION_MOUNTS = (f"competitions/{COMPETITION}", COMPETITION)
DATASET_MOUNTS = ("datasets/*/{}", "{}")
MODEL_MOUNTS = ("models/*/{}/*/*/*", "{}/*/*/*")  # framework, variation, version
OUTPUT_MOUNTS = ("notebooks/*/{}", *DATASET_MOUNTS)
# A run is a notebook's output, or a folder in it or in a data set, with at most one wrapper folder.
_RUN_PLACES = [f"{mount.format('*')}{deeper}" for deeper in ("", "/*", "/*/*") for mount in OUTPUT_MOUNTS]
_RUN_MARKER = "submission.csv"  # in a run folder from its first second on


def input_root() -> Path:
    """Where attached inputs are mounted: /kaggle/input, or the folder named by PREFCLS_INPUT_ROOT."""
    return Path(os.environ.get("PREFCLS_INPUT_ROOT", "/kaggle/input"))


def on_kaggle() -> bool:
    """Whether this is a Kaggle notebook machine."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def is_competition_rerun() -> bool:
    """Whether Kaggle is scoring a submitted notebook on the hidden test rows."""
    return "KAGGLE_IS_COMPETITION_RERUN" in os.environ


def run_folder(out: str, trained: str) -> Path:
    """The folder `out`; "auto": /kaggle/working on Kaggle, else runs/ and the last part of the name `trained`."""
    auto = input_root().parent / "working" if on_kaggle() else Path("runs") / Path(trained).name
    return auto if out == "auto" else Path(out)


def find_competition_file(name: str) -> Path:
    """The attached competition's train.csv or test.csv."""
    tried = [[f"{mount}/{extra}{name}" for mount in COMPETITION_MOUNTS] for extra in ("", "*/")]
    if found := find_first(tried, f"the competition's {name}"):
        return found
    places = "\n  ".join(str(input_root() / pattern) for patterns in tried for pattern in patterns)
    raise UserError(
        f"the competition's {name} was not found. Tried:\n  {places}\n"
        f"On Kaggle attach the competition {COMPETITION!r} as an input; elsewhere name a CSV file, or sample for "
        "the shipped rows."
    )


def backbone_patterns(name: str) -> list[list[str]]:
    """Where an attached input keeps the config.json of a backbone, for `find_first`.

    A data set named as the backbone, with or without the prefix "prefcls-", a data set with a folder of that name, or a
    Kaggle model; then each with an extra wrapper folder.
    """
    mounts = [mount.format(named) for named in (name, f"prefcls-{name}") for mount in DATASET_MOUNTS]
    mounts += [f"{mount.format('*')}/{name}" for mount in DATASET_MOUNTS]
    mounts += [mount.format(name) for mount in MODEL_MOUNTS]
    wrapped = [*(f"{m.format('*')}/*/{name}" for m in DATASET_MOUNTS), *(f"{mount}/*" for mount in mounts)]
    return [[f"{mount}/config.json" for mount in mounts], [f"{mount}/config.json" for mount in wrapped]]


def find_first(tried: list[list[str]], what: str) -> Path | None:
    """The file that matches the first of the pattern lists that any file matches; None if there is none.

    A config.json beside a submission.csv is a run's and never a backbone's. Where several files match the same list,
    and they or their folders differ, an input is attached twice: a UserError.
    """
    for patterns in tried:
        found = [p for p in glob_inputs(patterns) if p.name != "config.json" or not (p.parent / _RUN_MARKER).exists()]
        if len(found) > 1 and len(set(map(_content, found))) > 1:
            places = "\n  ".join(map(str, found))
            raise UserError(
                f"{what} is attached more than once, with different content:\n  {places}\n"
                "Detach all but one, or name the one you mean by its path."
            )
        if found:
            return found[0]
    return None


def glob_inputs(patterns: Iterable[str]) -> list[Path]:
    """Attached files that match, in order of the patterns; a file seen through two mounts counts once."""
    found: list[Path] = []
    for pattern in patterns:
        for path in sorted(input_root().glob(pattern)):
            if not any(path.samefile(other) for other in found):
                found.append(path)
    return found


def attached_runs() -> list[Path]:
    """The folders of all attached finished runs, outputs of notebooks and data sets alike; each run once."""
    runs: dict[str, Path] = {}
    for marker in glob_inputs(f"{place}/result.json" for place in _RUN_PLACES):
        folder = marker.parent
        if (folder / "model").is_dir() and (folder / "config.json").is_file():
            runs.setdefault(sha256(marker) + sha256(folder / "config.json"), folder)
    return list(runs.values())


def find_attached_run(name: str | Path) -> Path:
    """A run's folder: the one that is named, or the attached notebook output or data set of that name."""
    if "/" in str(name) or Path(name).is_dir():
        return Path(name)
    found = glob_inputs(f"{mount.format(name)}/config.json" for mount in OUTPUT_MOUNTS)
    return found[0].parent if found else Path(name)


def find_attached_csv(name: str) -> Path:
    """A CSV file: the one that is named, or that of this name in an attached data set; see `find_first`."""
    if "/" in name or Path(name).exists():
        return Path(name)
    return find_first([[f"{mount.format('*')}/{name}" for mount in DATASET_MOUNTS]], name) or Path(name)


def find_blend() -> Path | None:
    """The attached blend.json, or None; see `find_first`."""
    return find_first([[f"{place}/blend.json" for place in _RUN_PLACES]], "blend.json")


def attached_commits() -> dict[Path, str]:
    """The commit of each attached copy of the library, folder or wheel, where the notebooks' first cell looks."""
    names = ("prefcls_lib/__init__.py", "*.whl")
    places = [f"{mount.format('prefcls*')}/{extra}" for mount in DATASET_MOUNTS for extra in ("", "*/", "*/*/")]
    commits = {}
    for path in glob_inputs(f"{place}{name}" for name in names for place in places):
        folder = path.parent
        if path.suffix == ".whl":
            folder = (zipfile.Path(path) if path.is_file() else path) / "prefcls_lib"
        if (folder / "__init__.py").is_file():
            commits[path] = _read_commit(folder)
    return commits


def library_commit() -> str:
    """The commit that this copy of the library was built from; a checkout does not say."""
    return _read_commit(resources.files("prefcls_lib"))


def _read_commit(folder) -> str:
    file = folder / "commit.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "not recorded: no bundle"


def _content(path: Path) -> tuple:
    """What two attached copies must share: the file's bytes; of a config.json, all files of its folder."""
    if path.name != "config.json":
        return (sha256(path),)
    return tuple((p.name, sha256(p)) for p in sorted(path.parent.iterdir()) if p.is_file())
