"""Kaggle's folders, which no other module knows: attached inputs and the run folder."""

import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from prefcls_lib.runtime.files import UserError, sha256

COMPETITION = "llm-classification-finetuning"
# The folders between /kaggle/input and an attached input: the layout of 2026, and the older one.
MOUNTS = ("notebooks/*/", "datasets/*/", "models/*/", "")
WRAPPED = ("", "*/", "*/*/")  # in the input itself, in a folder of it, or one folder deeper


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
    levels = [[f"{mount}{COMPETITION}/{more}{name}" for mount in ("competitions/", "")] for more in ("", "*/")]
    if found := _find_first(levels, f"the competition's {name}"):
        return found
    places = "\n  ".join(str(input_root() / pattern) for patterns in levels for pattern in patterns)
    raise UserError(
        f"the competition's {name} was not found. Tried:\n  {places}\n"
        f"On Kaggle attach the competition {COMPETITION!r} as an input; elsewhere give --{Path(name).stem} FILE.csv, "
        f"or --{Path(name).stem} sample for the shipped rows (with papermill -p in place of --)."
    )


def find_attached_backbone(name: str) -> Path | None:
    """The folder of a backbone: an attached input of this name, with or without "prefcls-" before it, a folder of this
    name in one, or a Kaggle model (framework, variation and version are three folders); then one folder deeper."""
    places = [f"{one}/{more}" for one in (name, f"prefcls-{name}", f"*/{name}") for more in ("", "*/*/*/")]
    levels = [places, [f"*/*/{name}/", *(f"{place}*/" for place in places)]]  # the first alone lists whole inputs
    patterns = [[f"{mount}{place}config.json" for place in level for mount in MOUNTS] for level in levels]
    found = _find_first(patterns, f"backbone {name!r}")
    return found and found.parent


def find_attached(name: str | Path) -> Path:
    """The file or folder of this name: a path that exists, else an attached input, else what is in an input."""
    if "/" in str(name) or Path(name).exists():
        return Path(name)
    return _find_first([[f"{mount}{more}{name}" for mount in MOUNTS] for more in ("", "*/")], str(name)) or Path(name)


def find_blend() -> Path | None:
    """The attached blend.json, or None."""
    return _find_first([[f"{mount}*/{more}blend.json" for more in WRAPPED for mount in MOUNTS]], "blend.json")


def attached_runs() -> list[Path]:
    """The folders of all attached finished runs, outputs of notebooks and data sets alike; each run once."""
    runs: dict[str, Path] = {}
    for marker in glob_inputs(f"{mount}*/{more}result.json" for more in WRAPPED for mount in MOUNTS):
        folder = marker.parent
        if (folder / "model").is_dir() and (folder / "config.json").is_file():
            runs.setdefault(sha256(marker) + sha256(folder / "config.json"), folder)
    return list(runs.values())


def library_commit() -> str:
    """The commit that this copy of the library was built from; a checkout does not say."""
    file = resources.files("prefcls_lib") / "commit.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "not recorded: no bundle"


def glob_inputs(patterns: Iterable[str]) -> list[Path]:
    """Attached files that match, in order of the patterns; each once."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(input_root().glob(pattern))))


def _find_first(levels: list[list[str]], what: str) -> Path | None:
    """The first match of the first list of patterns that has one; None if no list has.

    Where a list has several matches whose content differs, something is attached twice: a UserError.
    """
    for patterns in levels:
        found = [path for path in glob_inputs(patterns) if not _is_of_a_run(path)]
        if len(found) > 1 and len(set(map(_content, found))) > 1:  # of one alone no content is read: it may be large
            places = "\n  ".join([f"{what} is attached more than once, with different content:", *map(str, found)])
            raise UserError(f"{places}\nDetach all but one, or name the one you mean by its path.")
        if found:
            return found[0]
    return None


def _is_of_a_run(path: Path) -> bool:
    """Whether this config.json is a run's or one of its models', and so no backbone's."""
    beside = [path.with_name(name) for name in ("submission.csv", "preference.json")]
    return path.name == "config.json" and any(map(Path.exists, beside))


def _content(path: Path) -> tuple:
    """What two attached copies must share: the file's bytes; of a folder or its config.json, all files in it."""
    folder = path.parent if path.name == "config.json" else path
    return tuple((p.name, sha256(p)) for p in sorted(folder.iterdir() if folder.is_dir() else [path]) if p.is_file())
