"""Upload the data sets of a bundle, and wait until a kernel would get them."""

import time
from pathlib import Path

import layout
from client import Kaggle
from follow import SECONDS_BETWEEN_LOOKS, StatusLine

from prefcls_lib.runtime.files import UserError, read_json, write_json

MOST_LOOKS = 120  # at a data set that is processed: an hour


def push_data_sets(kaggle: Kaggle, bundle: Path, owner: str, commit: str) -> None:
    """Create the data sets of a bundle, or add a version where their content is not what was sent from here last.

    Waits until Kaggle has unpacked the versions that were sent. What was sent is noted beside the bundle; a version
    that fails is forgotten, so that the next try sends it again.
    """
    record = bundle.with_name("kaggle-pushed.json")
    versions = {}
    for folder in sorted((bundle / "datasets").iterdir()):
        name, mark = f"{owner}/{folder.name}", layout.read_mark(folder)
        pushed = read_json(record) if record.is_file() else {}
        state, version = kaggle.data_set_state(name)
        there = state not in (None, "deleted")
        sent = pushed.get(name)
        if there and state != "failed" and sent and sent["mark"] == mark and version <= sent["version"]:
            print(f"{name}: unchanged since it was sent", flush=True)
        else:
            size = sum((folder / file).stat().st_size for file in layout.list_files(folder))
            print(f"{name}: uploading {size / 1e6:.0f} MB", flush=True)
            kaggle.upload_data_set(folder, name, commit if there else None)
            sent = {"mark": mark, "version": version + 1}
            write_json(record, {**pushed, name: sent})
        versions[name] = sent["version"]
    for name, version in versions.items():
        if problem := _wait_for_version(kaggle, name, version):
            write_json(record, {key: value for key, value in read_json(record).items() if key != name})
            raise UserError(f"data set {name}: {problem}. Run the same command again: it is sent anew.")


def _wait_for_version(kaggle: Kaggle, name: str, wanted: int) -> str:
    """Wait until a data set is ready at a version; "", or why it is not."""
    line = StatusLine()
    for _ in range(MOST_LOOKS):
        state, version = kaggle.data_set_state(name)
        if state == "failed":
            return "Kaggle could not unpack it"
        if state == "ready" and version >= wanted:
            line.show(f"data set {name}: version {version} is ready")
            line.end()
            return ""
        line.show(f"data set {name}: {state or 'created'}, waiting until version {wanted} is ready")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    line.end()
    return f"{state or 'not there'} at version {version}, an hour after version {wanted} was sent"
