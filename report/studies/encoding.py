"""How long reading, parsing and tokenising take, and how much memory: rows cut from the shipped ones.

python report/studies/encoding.py      57,477 rows, as many as the competition's; writes report/studies/encoding.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from prefcls_lib.runtime.devices import versions
from prefcls_lib.runtime.files import write_json

ROOT = Path(__file__).parents[2]
GOALS = {"seconds": 90.0, "peak_gib": 2.0}  # for the competition's rows, on 4 cores
# run in a process of its own, whose peak of memory is nobody else's
MEASURE = """
import json, resource, sys, time
started = time.perf_counter()
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.tokenization import encode_rows
imported = time.perf_counter()
rows = read_rows(sys.argv[1], labelled=False)
read = time.perf_counter()
encoded = encode_rows(rows, load_backbone(sys.argv[2], 512).tokenizer, 512, "none")
ended = time.perf_counter()
print(json.dumps({"rows": len(rows), "tokens": int(encoded.lengths[encoded.sides].sum()),
                  "import_seconds": imported - started, "read_seconds": read - imported,
                  "encode_seconds": ended - read, "seconds": ended - started,
                  "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def measure(count: int, backbones: list[str]) -> list[dict]:
    """One line a backbone: seconds of each part, and the peak of resident memory."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        rows = str(Path(folder) / "test.csv")
        subprocess.run([sys.executable, ROOT / "kaggle" / "rehearsal" / "rows.py", str(count), rows], check=True)
        for backbone in backbones:
            command = [sys.executable, "-c", MEASURE, rows, backbone]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            lines.append({"backbone": Path(backbone).name, **json.loads(done.stdout)})
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--backbones", nargs="+", default=["minilm"], help="minilm, or folders with a tokenizer")
    arguments = parser.parse_args()
    lines = measure(arguments.rows, arguments.backbones)
    met = all(line[name] < most for line in lines for name, most in GOALS.items())
    result = {"versions": versions(), "cores": os.cpu_count(), "goals": GOALS, "met": met, "lines": lines}
    write_json(Path(__file__).parent / "encoding.json", result)
    print(pd.DataFrame(lines).to_string(index=False, float_format="{:.2f}".format))
    print(f"under {GOALS['seconds']:.0f} s and {GOALS['peak_gib']:.0f} GiB: {'yes' if met else 'NO'}")


if __name__ == "__main__":
    main()
