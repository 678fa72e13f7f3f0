# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Submit: predict the test rows with every attached run
#
# This notebook trains nothing. It predicts with all runs that are attached to it, the outputs of the training notebooks
# or the data set `prefcls-runs`, blends them, and writes `submission.csv`. What is submitted runs again on the hidden
# test rows, about 25,000 instead of three, within nine hours.

# %% tags=["parameters"]
test = "competition"  # a CSV, "sample", or the attached competition
out = "submission.csv"
time_budget_hours = 8.0  # models that are not complete by then are left out

# %% [markdown]
# ## The library, and whether this machine can do it

# %%
import importlib.util
import os
import sys
from pathlib import Path

_root = Path(os.environ.get("PREFCLS_INPUT_ROOT", "/kaggle/input"))
_places = [f"{mount}prefcls*/{deeper}" for mount in ("datasets/*/", "") for deeper in ("", "*/", "*/*/")]
_tried = [place + name for name in ("prefcls_lib/__init__.py", "*.whl") for place in _places]
_found = [path for pattern in _tried for path in sorted(_root.glob(pattern))]
sys.path[:0] = [str(path if path.suffix == ".whl" else path.parents[1]) for path in _found]
if importlib.util.find_spec("prefcls_lib") is None:
    raise ModuleNotFoundError(f"attach the data set prefcls-lib. Tried in {_root}: {', '.join(_tried)}")

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # plain progress bars are enough here
import pandas as pd

from prefcls_lib.data import loading, submission
from prefcls_lib.doctor import checks
from prefcls_lib.ensemble import submit

checks.first_look()

# %% [markdown]
# ## Predict
#
# A valid submission made from the class shares is written first, before any text is read. A new one is written after
# each model: first those of a run without a network, then one of each network by falling weight, then the next ones.
# All GPUs share the rows; what is not complete in time is left out. `blend.json`, where one is attached, says how to
# weigh and calibrate the runs. Otherwise the weights are fitted here on the rows that all runs predicted out of sample.
#
# The first run has three rows, too few to measure a pace. So it predicts the shipped rows as well, and prints how long
# the hidden ones would take at most. In the rerun a broken row is printed and kept, since nobody could correct it.

# %%
path = loading.locate_csv(test, "test")
record = submit.submit_file(path, out, time_budget_hours)
print(*record["left_out"], sep="\n")
pd.DataFrame(record["runs"])

# %% [markdown]
# ## The submission, read back

# %%
submission.check_submission(out, list(pd.read_csv(path, dtype=str, keep_default_na=False)["id"])).head()
