"""Presets: parameter files that run as they are, say why each value is there, and whose hours are those of the plan."""

import functools
import re
from importlib.util import find_spec
from pathlib import Path

import layout
import numpy as np
import pytest
import train
import yaml
from conftest import run_arguments
from test_notebooks import PRESETS
from transformers import AutoConfig

from prefcls_lib import cli
from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import MINILM_PACKAGE
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.files import UserError, read_json
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


def test_original_is_the_study_and_nothing_of_ours():
    """What the study's notebooks and README say, and no feature or baseline of this project."""
    config = RunConfig.from_yaml(FOLDER / "original.yaml", {})
    config = config.with_recipe(choose_recipe(AutoConfig.for_model("roberta")))
    study = {"num_epochs": 10, "max_length": 256, "label_smoothing": 0.1, "weight_decay": 0.01, "head": "concat"}
    assert {name: getattr(config, name) for name in study} == study
    assert (config.text_cleaning, config.start_from) == ("ascii", "none")


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


def test_strong_fits_a_t4_and_its_disk():
    """Memory of one T4 at its length; checkpoints within Kaggle's 20 GB, which those of two seeds are not."""
    settings = read_preset("strong")
    config = AutoConfig.for_model(**read_json(ROOT / "report" / "backbones" / "deberta-v3-large.json")["config"])
    length = settings["max_length"]
    assert capacity.largest_micro_batch(config, t4_plan.T4_BYTES, True, length) >= 2 * length
    assert capacity.disk_bytes(config, settings["num_seeds"], 1) < 20e9 < capacity.disk_bytes(config, 2, 2)


def test_unknown_preset_gets_the_nearest(capsys):
    """On the command line and for Kaggle; one that is like no other gets no hint."""
    assert cli.main(["run", "--config", str(FOLDER / "stron.yaml")]) == 2
    assert f"stron.yaml: no such file. Did you mean {FOLDER / 'strong.yaml'}?" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"orginal\.yaml: no such file\. Did you mean .*original\.yaml"):
        train.read_given("orginal", [])
    with pytest.raises(UserError, match=r"zzz\.yaml: no such file\. Write one"):
        train.read_given("zzz", [])


def test_what_a_kernel_gets_of_a_preset():
    """The preset over the kernel's defaults, SET over both; the backbone by the name of its data set."""
    given = train.read_given("strong", ["num_epochs=1"])
    parameters = train.read_parameters("01-deberta-v3-xsmall", "me/my-reward-model", given, [])
    assert parameters["init_from"] == "my-reward-model"
    assert (parameters["max_length"], parameters["num_epochs"], parameters["num_seeds"]) == (768, 1, 1)
    assert parameters["time_budget_hours"] == 11.5
    assert "init_from" not in train.read_parameters("02-roberta-base", "roberta-base", {}, [])
    assert train.PRESET_NOTEBOOK in layout.OWN_BACKBONE
