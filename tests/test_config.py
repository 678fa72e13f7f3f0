"""Settings: coerced to their type, refused by name, the same after a trip through JSON."""

import json
import math
import types
import typing

import pytest

from prefcls_lib.config import RunConfig
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.runtime.files import UserError

# what papermill and --set deliver: setting, text, value
TEXTS = [
    ("gradient_checkpointing", "false", False), ("gradient_checkpointing", "True", True),
    ("gradient_checkpointing", "off", False), ("learning_rate", "1e-4", 0.0001), ("learning_rate", " 3e-5 ", 0.00003),
    ("folds", "[1,2]", (1, 2)), ("folds", "3", (3,)), ("num_epochs", "none", None), ("num_epochs", "null", None),
    ("label_smoothing", "", None), ("num_epochs", "2", 2), ("max_length", "256", 256), ("batch_size", "1e1", 10),
    ("backbone", "FacebookAI/roberta-base", "FacebookAI/roberta-base"), ("mixed_precision", "No", "no"),
]  # fmt: skip

# words that the message must have: settings with wrong values
WRONG = {
    "expected a number like 0.5": [("learning_rate", value) for value in ("fast", [1], "2026-13-45", ".nan")],
    "expected a number from 0 to 1.": [("learning_rate", value) for value in (float("nan"), "nan", -1e-5, 2)],
    "expected a number from 0 to 4294967295": [("seed", 2**32), ("seed", -1)],
    "expected a number from 0 to 1000000000": [("max_train_rows", -1)],
    "expected a number from 1 to 1000": [("num_epochs", 0)],
    "expected a number from 16 to": [("max_length", 15)],
    "expected text": [("extra_train", [["a.csv"]]), ("backbone", True), ("backbone", ""), ("backbone", "a\0b"),
                      ("out", "a\ud800")],
    "expected true or false": [("gradient_checkpointing", "maybe"), ("gradient_checkpointing", 1)],
    "choose one of symmetric, concat": [("head", "siamese")],
    "choose one of auto, no, bf16, fp16": [("mixed_precision", "fp8")],
    "expected a whole number": [
        ("num_epochs", 1.5), ("num_epochs", True), ("num_epochs", float("nan")), ("batch_size", None),
        ("batch_size", math.inf), ("seed", "9" * 400), ("folds", "all"), ("folds", {"a": 1}), ("folds", "[0, [1]]")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "value"), TEXTS)
def test_text_becomes_the_type_of_the_setting(name, text, value):
    """Papermill and --set deliver text; a run sees the same value as one who typed it in Python."""
    coerced = getattr(RunConfig.from_mapping({name: text}), name)
    assert coerced == value and type(coerced) is type(value)


@pytest.mark.parametrize("words", WRONG)
def test_wrong_value_is_refused_by_name(words):
    """The message names the setting and what it expected."""
    for name, value in WRONG[words]:
        with pytest.raises(UserError, match=f"^setting {name}=") as error:
            RunConfig.from_mapping({name: value})
        assert words in str(error.value)


NAMES = {"learning_rat": "Did you mean 'learning_rate'", "max_lenght": "Did you mean 'max_length'",
         "epochs": "Did you mean 'num_epochs'", "fold": "Did you mean 'folds'", "x" * 10**6: "Settings are: backbone",
         "xyzzy": "Settings are: backbone, train", 1: "Settings are: backbone, train"}  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(name)[:20])
def test_unknown_name_gets_the_nearest_right_one_or_all(name):
    """A setting that does not exist is never ignored."""
    with pytest.raises(UserError, match=r"^settings: unknown setting ") as error:
        RunConfig.from_mapping({name: 1})
    assert NAMES[name] in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize(
    ("num_folds", "folds"), [(5, [5]), (5, [-1]), (5, []), (5, [1, 1]), (2, [0, 1, 2]), (10, "[3,3]")]
)
def test_folds_that_contradict_num_folds_are_refused(num_folds, folds):
    """Folds are different numbers below num_folds, one at least."""
    with pytest.raises(UserError, match=rf"^setting folds=.*from 0 to {num_folds - 1} \(num_folds={num_folds}\)"):
        RunConfig(num_folds=num_folds, folds=folds)


def test_every_number_has_its_range():
    """No number can be set to a senseless value, but for folds, which num_folds bounds."""
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    free = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.Annotated}
    assert {name for name, hint in free.items() if {int, float} & {hint, *typing.get_args(hint)}} == {"folds"}
    assert len(free) < len(hints)


def test_yaml_file_is_read_as_a_person_means_it(tmp_path):
    """Each value as after --set, which wins over the file; comments alone are no settings."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 1e-4\nfolds: [0, 1]\ngradient_checkpointing: on\nnum_epochs: 3\ndropout:\n"
        "extra_train: [a, b]  # two files\n",
        encoding="utf-8",
    )
    expected = RunConfig(learning_rate=1e-4, folds=(0, 1), gradient_checkpointing=True, num_epochs=5, extra_train="a,b")
    assert RunConfig.from_yaml(path, {"num_epochs": "5"}) == expected
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert RunConfig.from_yaml(path, {}) == RunConfig.from_yaml(None, {}) == RunConfig()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"seed: [1", "cannot be read (ParserError: "), (b"seed: \xff\xfe", "cannot be read (UnicodeDecodeError: "),
     (b"seed: 2026-13-45", "setting seed='2026-13-45'"), (b"seed: .nan", "setting seed='.nan'"),
     (b"a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]", "unknown setting 'a'"), (b"- seed\n- 3\n", "found a list"),
     (b"seed 3", "found a str"), (b"sed: 3", "unknown setting 'sed'. Did you mean 'seed'"),
     (b"on: 3", "unknown setting 'on'"), (None, "no such file. Check the path.")],
)  # fmt: skip
def test_bad_yaml_file_is_refused_with_its_name(tmp_path, content, words):
    """One message that says which file; a wrong value is named by its setting."""
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        RunConfig.from_yaml(path, {})
    assert words in str(error.value)
    assert str(path) in str(error.value) or str(error.value).startswith("setting seed")


def test_namespace_of_a_notebook_is_read_without_what_is_ipythons():
    """Modules, functions, classes, private names, In and Out are no settings; everything plain is."""
    namespace = {
        "__name__": "__main__", "_": 1, "_i1": "x = 1", "In": ["x = 1"], "Out": {}, "math": math,
        "get_ipython": lambda: None, "exit": types.SimpleNamespace(), "RunConfig": RunConfig,
        "backbone": "minilm", "num_epochs": "2", "folds": [0, 1],
    }  # fmt: skip
    expected = RunConfig(backbone="minilm", num_epochs=2, folds=(0, 1))
    assert RunConfig.from_namespace(namespace) == expected
    namespace |= {"side": 1, "ids": [1, 2], "ece": 0.1, "name": "x"}  # of later cells: the first can be run again
    assert RunConfig.from_namespace(namespace) == expected
    for value in (1e-4, "1e-4", None, [1], True):  # papermill adds a mistyped name, too
        with pytest.raises(UserError, match=r"notebook parameters: unknown setting 'lerning_rate'. Did you mean 'lear"):
            RunConfig.from_namespace({**namespace, "lerning_rate": value})


def test_config_survives_json():
    """to_dict is plain JSON, and from_mapping of it is the same config."""
    config = RunConfig(folds=(2, 0), learning_rate=3e-5, num_epochs=None, gradient_checkpointing=True, out="x/y")
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert RunConfig.from_mapping(json.loads(text)) == config
    assert json.loads(text)["folds"] == [2, 0]


@pytest.mark.parametrize("model_type", RECIPES)
def test_recipe_fills_only_what_is_open(model_type):
    """What the user gave stays; after the recipe nothing is None but what may be left out, and all is allowed."""
    config = RunConfig(learning_rate=0.5).with_recipe(RECIPES[model_type])
    assert (config.learning_rate, config.num_epochs) == (0.5, RECIPES[model_type]["num_epochs"])
    assert {name for name, value in config.to_dict().items() if value is None} == {
        "time_budget_hours", "resume_from", "num_processes", "init_from", "extra_train"
    }  # fmt: skip
