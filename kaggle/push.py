"""Upload a bundle with Kaggle's client: python kaggle/push.py OWNER --kernels 02-roberta-base submit --submit 3

Data sets are created, or get a new version where their content changed since the last push. Kernels are pushed only
where they are named, since a pushed kernel runs at once and uses up GPU quota.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import check
import follow
import layout
from client import Kaggle, run_command

from prefcls_lib.runtime.files import UserError, read_json, write_json


def read_bundle(bundle: Path, owner: str) -> dict:
    """The manifest of a bundle that may be uploaded.

    Raises:
        UserError: the bundle is not sound or not this owner's.
    """
    facts = layout.read_manifest(bundle)
    if layout.check_owner(owner) != facts["owner"]:
        raise UserError(f"{bundle} was built for OWNER={facts['owner']}, not {owner}. Build it again.")
    problems = check.find_problems(bundle)
    if problems:
        raise UserError("the bundle is not sound and nothing was uploaded:\n  " + "\n  ".join(problems))
    return facts


def push_data_sets(kaggle: Kaggle, bundle: Path, facts: dict) -> None:
    """Create the data sets of a bundle, or add a version where their files are not those of the last push from here.

    Waits until Kaggle has unpacked them.
    """
    record = bundle.with_name("kaggle-pushed.json")
    names = []
    for folder in sorted((bundle / "datasets").iterdir()):
        name = f"{facts['owner']}/{folder.name}"
        names.append(name)
        files = {path: file for path, file in facts["files"].items() if path.startswith(f"datasets/{folder.name}/")}
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        pushed = read_json(record) if record.is_file() else {}
        exists = kaggle.data_set_status(name) is not None
        if exists and pushed.get(name) == digest:
            print(f"{name}: unchanged since the last push", flush=True)
            continue
        print(f"{name}: uploading {sum(file['size'] for file in files.values()) / 1e6:.0f} MB", flush=True)
        kaggle.upload_data_set(folder, name, facts["commit"] if exists else None)
        write_json(record, {**pushed, name: digest})
    follow.wait_for_data_sets(kaggle, names)


def push_kernels(kaggle: Kaggle, bundle: Path, owner: str, names: list[str]) -> None:
    """Push kernels of a bundle, which starts them."""
    for name in names:
        kernel = f"{owner}/{layout.kernel_slug(name)}"
        version = kaggle.push_kernel(bundle / "kernels" / name, kernel)
        print(f"{kernel}: version {version} was started", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Push; 0 when it worked, 2 when the user must put something right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--kernels", nargs="*", default=[], metavar="NAME", help="push, and so start, these")
    parser.add_argument("--submit", metavar="VERSION", type=int, help="submit this version of the submit kernel")
    arguments = parser.parse_args(argv)
    owner, bundle = arguments.owner, arguments.bundle

    def command(kaggle: Kaggle) -> int:
        facts = read_bundle(bundle, owner)
        known = sorted(path.name for path in (bundle / "kernels").iterdir())
        if unknown := [name for name in arguments.kernels if name not in known]:
            raise UserError(f"KERNELS: {', '.join(unknown)} not in the bundle. Choose from {', '.join(known)}.")
        kaggle.sign_in(owner)
        push_data_sets(kaggle, bundle, facts)
        push_kernels(kaggle, bundle, owner, arguments.kernels)
        if arguments.submit:
            kernel = f"{owner}/{layout.kernel_slug(layout.SUBMIT)}"
            number = kaggle.submit(kernel, arguments.submit, f"prefcls {facts['commit'][:12]}")
            print(f"submission {number}: version {arguments.submit} of {kernel}", flush=True)
        return 0

    return run_command("kaggle-push", command, f"make kaggle-watch OWNER={owner} NOTEBOOK=...")


if __name__ == "__main__":
    sys.exit(main())
