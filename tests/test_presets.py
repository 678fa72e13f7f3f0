"""Presets: parameter files that run as they are, say why each value is there, and whose hours are those of the plan."""

import functools
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import run_arguments
from test_notebooks import PRESETS
from transformers import AutoConfig

from prefcls_lib import cli
from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.models.backbones import MINILM_PACKAGE
from prefcls_lib.runtime.files import read_json
from report.studies import t4_plan

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks" / "params"


def read_preset(name: str) -> dict:
    """The settings that a preset names, as a run has them."""
    settings = read_settings(FOLDER / f"{name}.yaml")
    config = RunConfig.from_mapping(settings).to_dict()
    return {key: config[key] for key in settings}


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_has_a_reason(name):
    """A comment on each line; every value is allowed, and is what it looks like in YAML."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for line in text.splitlines():
        assert re.search(r"#.{3,}", line) or line == "folds: [0]", line
    assert read_preset(name) == yaml.safe_load(text)


@pytest.mark.parametrize("name", PRESETS)
def test_runs_through_the_command_line(name, home, reward_folders, tmp_path):
    """On a tiny encoder, shorter and on fewer folds; all else is in config.json as the file has it."""
    out, preset = tmp_path / "run", read_preset(name)
    more = [f"start_from={preset.get('start_from', 'structure_logistic')}"]
    more += [f"init_from={reward_folders['bert']}"] if name == "strong" else []
    assert cli.main([*run_arguments(home, out, *more), "--config", str(FOLDER / f"{name}.yaml")]) == 0
    used = read_json(out / "config.json")["settings"]
    smaller = ("backbone", "init_from", "num_folds", "folds", "max_length", "num_epochs", "batch_size")
    assert {k: used[k] for k in preset if k not in smaller} == {k: v for k, v in preset.items() if k not in smaller}
    assert len(list((out / "model").iterdir())) == used["num_seeds"]


count_tokens = functools.cache(t4_plan.count_tokens)


def hours_of_training(name: str, backbone: str) -> tuple[float, float]:
    """Projected on two T4, from the lengths of the shipped rows: all epochs of all seeds."""
    settings = RunConfig.from_mapping(read_preset(name)).to_dict()
    config = AutoConfig.for_model(**read_json(ROOT / "report" / "backbones" / f"{backbone}.json")["config"])
    cut = np.minimum(count_tokens(), settings["max_length"])
    rows = 3 * t4_plan.EPOCH_ROWS * settings["num_epochs"] * settings["num_seeds"] / 2
    fast, slow = (rows * 2 * seconds / len(cut) / 3600 for seconds in t4_plan.t4_seconds(config, cut))
    return fast, slow


@pytest.mark.skipif(find_spec(MINILM_PACKAGE) is None, reason="counts tokens with MiniLM's tokenizer")
@pytest.mark.parametrize(
    ("name", "backbone"),
    [("original", "deberta-v3-xsmall"), ("original", "roberta-base"), ("original", "electra-large-discriminator"),
     ("quick", "deberta-v3-xsmall"), ("strong", "deberta-v3-large")],
)  # fmt: skip
def test_hours_in_the_readme_are_those_of_the_plan(name, backbone):
    """And they are below the time budget, or the preset has none."""
    (line,) = (x for x in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if x.startswith(f"| `{name}`"))
    fast, slow = hours_of_training(name, backbone)
    assert f"{fast:.1f} to {slow:.1f}" in line
    budget = read_preset(name).get("time_budget_hours")
    assert budget is None or (slow < budget and f"at most {budget}" in line)


def test_unknown_preset_gets_the_nearest(prefcls):
    """One that is like no other gets no hint."""
    for name, hint in (("stron", f"Did you mean {FOLDER / 'strong.yaml'}?"), ("zzz", "Check the path")):
        code, _, error = prefcls("run", "--config", FOLDER / f"{name}.yaml")
        assert (code, f"{name}.yaml: no such file. {hint}" in error) == (2, True)
