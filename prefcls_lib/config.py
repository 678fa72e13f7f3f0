"""RunConfig: every setting of a run, in one flat frozen record.

The names are those of `--set key=value`, of a YAML file, and of the notebooks' parameters cell, so a value
means the same thing wherever it is typed.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from prefcls_lib.runtime.files import UserError

CHOICES = {
    "architecture": ("siamese", "cross"),
    "text_cleaning": ("none", "whitespace", "ascii"),
    "pooling": ("mean", "first"),
    "head": ("symmetric", "concat"),
    "recipe": ("default", "original"),
    "schedule": ("linear", "plateau"),
    "on_collapse": ("warn", "stop", "restart"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
}
# setting: (smallest allowed value, largest allowed value)
RANGES = {
    "max_train_rows": (0, math.inf),
    "num_folds": (2, 100),
    "num_seeds": (1, 100),
    "num_processes": (1, 1024),
    "seed": (0, 2**32 - 1),
    "max_length": (16, 65_536),
    "num_epochs": (1, 1000),
    "batch_size": (1, 65_536),
    "max_tokens_per_micro_step": (16, math.inf),
    "validations_per_epoch": (1, 1000),
    "learning_rate": (0.0, 1.0),
    "layer_decay": (0.1, 1.0),
    "head_only_rows": (0, math.inf),
    "collapse_after_rows": (1, math.inf),
    "save_every_minutes": (0.0, math.inf),
    "time_budget_hours": (0.001, 1000.0),
    "head_learning_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "warmup_ratio": (0.0, 1.0),
    "label_smoothing": (0.0, 0.5),
    "soft_label_share": (0.0, 1.0),
    "dropout": (0.0, 0.9),
    "max_grad_norm": (1e-6, math.inf),
}


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run. `None` means: what the backbone's recipe says (`recipes.RECIPES`)."""

    # what is run, on what, to where
    backbone: str = "microsoft/deberta-v3-xsmall"  # folder, attached Kaggle input, or hub name
    train: str = "competition"  # CSV path, "sample", or "competition" (the attached Kaggle input)
    test: str = "competition"  # the same
    extra_train: str | None = None  # CSV of more rows, for training alone; none that shares a validation prompt is used
    out: str = "auto"  # run folder; auto: /kaggle/working on Kaggle, else runs/<backbone>
    # rows and folds
    max_train_rows: int = 0  # rows of the training file to use, chosen by content; 0: all
    num_folds: int = 10  # stratified folds grouped by prompt
    folds: tuple[int, ...] = (0,)  # folds to validate on, one model each; (0,) is a 90/10 split
    seed: int = 42
    num_seeds: int = 1  # models a fold, with seeds seed, seed + 1, ...; their predictions are averaged
    # tokens
    text_cleaning: str = "none"  # none | whitespace | ascii
    max_length: int = 512  # tokens of one sequence, special tokens included: of a side, or of a cross-encoder's pair
    # model
    architecture: str = "siamese"  # siamese (each answer by itself) | cross (both answers in one sequence)
    init_from: str | None = None  # a reward model's folder, attached input or hub name: used in place of `backbone`
    pooling: str = "mean"  # mean | first; a reward model brings its own
    head: str = "symmetric"  # symmetric | concat (the original's)
    structure_features: bool = True
    dropout: float | None = None  # in encoder and head
    # training
    recipe: str = "default"  # default | original (the study's, kept to show what it does)
    num_epochs: int | None = None
    learning_rate: float | None = None  # peak rate of the encoder's top layer
    layer_decay: float | None = None  # each layer below has this share of the rate above it
    head_learning_rate: float | None = None
    head_only_rows: int | None = None  # rows for a head-only phase before the encoder moves; 0: none
    batch_size: int = 32  # pairs in one optimizer step
    max_tokens_per_micro_step: int | None = None  # tokens held for one backward pass
    gradient_checkpointing: bool = False  # recompute activations: a third more time, far less memory
    validations_per_epoch: int | None = None
    schedule: str | None = None  # linear (to zero) | plateau (a tenth after an epoch without progress)
    warmup_ratio: float | None = None
    weight_decay: float = 0.01
    label_smoothing: float | None = None  # in the training loss only, never in a reported number
    soft_label_share: float = 0.5  # of the loss, on rows that carry soft labels; the rest is the vote's
    max_grad_norm: float = 1.0
    mixed_precision: str = "auto"  # auto | no | bf16 | fp16
    on_collapse: str = "restart"  # warn | stop | restart (new seed, half the rate, twice the warm-up, at most twice)
    collapse_after_rows: int = 10_000  # no verdict before so many training rows; DeBERTa-v3 needs them to move
    # the session
    num_processes: int | None = None  # None: one a GPU. Folds and seeds side by side; a single model by all together
    time_budget_hours: float | None = None  # the whole command ends within it; None: as long as it takes
    save_every_minutes: float = 20.0  # a checkpoint at least this often, and at every validation
    resume_from: str | None = None  # an earlier run's folder, read-only: it is copied, and the run goes on

    def __post_init__(self):
        for field in fields(self):
            value = _coerce(field.name, getattr(self, field.name), _TYPES[field.name])
            object.__setattr__(self, field.name, value)
            _check_value(field.name, value)
        bad = [fold for fold in self.folds if not 0 <= fold < self.num_folds]
        if bad or not self.folds or len(set(self.folds)) != len(self.folds):
            raise UserError(
                f"setting folds={list(self.folds)}: give different whole numbers from 0 to "
                f"{self.num_folds - 1} (num_folds={self.num_folds})."
            )
        if self.architecture == "cross" and self.head == "concat":
            raise UserError("setting head='concat': a cross-encoder has no two answers to join. Leave head=symmetric.")
        if self.architecture == "cross" and self.init_from is not None:
            raise UserError("setting init_from: a reward model reads one answer at a time. Set architecture=siamese.")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object], source: str = "settings") -> "RunConfig":
        """Build a config from names and values, as a YAML file, `--set` or papermill deliver them.

        Values may be text ("false", "1e-4", "[1,2]"): they are coerced to the setting's type.

        Raises:
            UserError: a name that is no setting (with the nearest right one), or a value out of range.
        """
        names = list(_TYPES)
        for name in settings:
            if name not in names:  # a YAML key may be a number, or `on`, which YAML reads as true
                near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"Settings are: {', '.join(names)}."
                raise UserError(f"{source}: unknown setting {name!r}. {hint}")
        return cls(**settings)

    @classmethod
    def from_namespace(cls, namespace: dict[str, object]) -> "RunConfig":
        """Build a config from a notebook's `globals()`, right after its parameters cell.

        Every plain value defined so far is taken as a setting, so that a parameter which papermill
        injected under a mistyped name stops the run instead of being ignored. When the cell is run again in the same
        kernel, later cells have left names of their own: then only those are refused that nearly are a setting.
        """
        plain = (str, int, float, bool, list, tuple, dict, types.NoneType)
        ipython = {"In", "Out"}
        settings = {
            name: value
            for name, value in namespace.items()
            if isinstance(value, plain) and not name.startswith("_") and name not in ipython
        }
        if namespace.get("_prefcls_config_read"):
            near = {name for name in settings if difflib.get_close_matches(name, _TYPES, n=1, cutoff=0.8)}
            settings = {name: value for name, value in settings.items() if name in near}
        namespace["_prefcls_config_read"] = True
        return cls.from_mapping(settings, source="notebook parameters")

    @classmethod
    def from_yaml(cls, path: str | Path | None, overrides: Mapping[str, object]) -> "RunConfig":
        """Read settings from a YAML file (or none), then apply `overrides` on top."""
        settings: dict = {}
        if path is not None:
            try:
                settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or no such date
                reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
                raise UserError(
                    f"{path}: cannot be read as YAML ({reason}). Write one `setting: value` a line."
                ) from error
            if not isinstance(settings, dict):
                raise UserError(f"{path}: expected lines of `setting: value`, found a {_kind(settings)}.")
        return cls.from_mapping({**settings, **overrides}, source=str(path or "--set"))

    def with_recipe(self, recipe: Mapping[str, object]) -> "RunConfig":
        """Fill every setting that is still None from the backbone's recipe."""
        return replace(self, **{k: v for k, v in recipe.items() if getattr(self, k) is None})

    def to_dict(self) -> dict:
        """Plain values, as they are stored in config.json."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


_TYPES = typing.get_type_hints(RunConfig)


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else type(value).__name__


def _coerce(name: str, value: object, annotation: object) -> object:
    """Turn `value` into the annotated type, or say what was expected."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if types.NoneType in options:
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null")):
            return None
        annotation = options[0]
    error = UserError(f"setting {name}={value!r}: expected {_describe(annotation)}.")
    if isinstance(value, str) and annotation is not str:
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: 2024-13-45 is a date to YAML
            raise error from None
    if annotation == tuple[int, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(name, item, int) for item in items)
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise error
    if annotation is str:
        if isinstance(value, (str, Path)) and str(value).strip():
            return str(value)
        raise error
    if isinstance(value, bool) or value is None or isinstance(value, (list, tuple, dict)):
        raise error
    try:
        number = float(value)  # YAML reads 1e-4 as text
    except (TypeError, ValueError, OverflowError):
        raise error from None
    if annotation is int:
        if not number.is_integer():
            raise error
        return int(number)
    return number


def _describe(annotation: object) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, "a list of whole numbers such as [0, 1]")


def _check_value(name: str, value: object) -> None:
    if name in CHOICES and value is not None and value not in CHOICES[name]:
        raise UserError(f"setting {name}={value!r}: choose one of {', '.join(CHOICES[name])}.")
    if name in RANGES and value is not None:
        low, high = RANGES[name]
        if not low <= value <= high:  # also false for NaN
            raise UserError(f"setting {name}={value!r}: expected a number from {low:g} to {high:g}.")
        if not math.isfinite(value):
            raise UserError(f"setting {name}={value!r}: expected a finite number.")
