"""Upload a bundle with Kaggle's own client: python kaggle/push.py OWNER --kernels 02-roberta-base submit --submit 3

Data sets are created, or get a new version where their content changed since the last push. Kernels are pushed only
where they are named, since a pushed kernel runs at once and uses up GPU quota.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import check
import layout

from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.runtime.kaggle import COMPETITION

# What the client prints where it fails and still exits with 0.
FAILED = ("error:", "Upload unsuccessful", "Skipping", "not valid dataset sources", "not valid competition sources")
CLIENT = Path(sys.executable).with_name("kaggle")


def push_bundle(bundle: Path, owner: str, kernel_names: list[str], submit_version: str | None = None) -> None:
    """Upload the data sets of a checked bundle, then push the named kernels.

    Args:
        bundle: from `make kaggle-bundle`.
        owner: must be the bundle's.
        kernel_names: folders under kernels/ to push, which starts them.
        submit_version: submit this version of the submit kernel to the competition.

    Raises:
        UserError: the bundle is not sound or not this owner's, or the client reports a failure.
    """
    facts = layout.read_manifest(bundle)
    if layout.check_owner(owner) != facts["owner"]:
        raise UserError(f"{bundle} was built for OWNER={facts['owner']}, not {owner}. Build it again.")
    problems = check.find_problems(bundle)
    if problems:
        raise UserError("the bundle is not sound and nothing was uploaded:\n  " + "\n  ".join(problems))
    known = sorted(path.name for path in (bundle / "kernels").iterdir())
    unknown = [name for name in kernel_names if name not in known]
    if unknown:
        raise UserError(f"KERNELS: {', '.join(unknown)} not in the bundle. Choose from {', '.join(known)}.")
    for folder in sorted((bundle / "datasets").iterdir()):
        push_data_set(folder, f"{owner}/{folder.name}", facts)
    for name in kernel_names:
        print(_run("kernels", "push", "-p", bundle / "kernels" / name), flush=True)
    if submit_version:
        kernel = f"{owner}/{layout.kernel_slug(layout.SUBMIT)}"
        message = f"prefcls {facts['commit'][:12]}"
        arguments = ["-f", "submission.csv", "-k", kernel, "-v", submit_version, "-m", message]
        print(_run("competitions", "submit", COMPETITION, *arguments), flush=True)


def push_data_set(folder: Path, name: str, facts: dict) -> None:
    """Create a data set, or add a version where its files are not those of the last push from here."""
    files = {path: file for path, file in facts["files"].items() if path.startswith(f"datasets/{folder.name}/")}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    record = folder.parents[1].with_name("kaggle-pushed.json")
    pushed = read_json(record) if record.is_file() else {}
    exists = _call("datasets", "status", name).returncode == 0
    if exists and pushed.get(name) == digest:
        print(f"{name}: unchanged since the last push", flush=True)
        return
    if exists:
        print(_run("datasets", "version", "-p", folder, "-m", facts["commit"], "--dir-mode", "zip", "-q"), flush=True)
    else:
        print(_run("datasets", "create", "-p", folder, "--dir-mode", "zip", "-q"), flush=True)
    write_json(record, {**pushed, name: digest})


def _call(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(part) for part in (CLIENT, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def _run(*arguments: object) -> str:
    """What the client printed; a failure that it hides behind exit code 0 is one all the same."""
    done = _call(*arguments)
    text = f"{done.stdout}\n{done.stderr}".strip()
    if done.returncode or any(sign in text for sign in FAILED):
        raise UserError(f"kaggle {' '.join(map(str, arguments))} failed:\n{text[-2000:]}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Push; 0 when it worked, 2 when the user must put something right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--kernels", nargs="*", default=[], metavar="NAME", help="push, and so start, these")
    parser.add_argument("--submit", metavar="VERSION", help="submit this version of the submit kernel")
    arguments = parser.parse_args(argv)
    try:
        push_bundle(arguments.bundle, arguments.owner, arguments.kernels, arguments.submit)
    except UserError as error:
        print(f"kaggle-push: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
