"""RunConfig: every setting of a run, in one flat frozen record.

The names and values are those of `--set key=value`, of a YAML file, and of the notebooks' parameters cell.
"""

import difflib
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import yaml

from prefcls_lib.runtime.files import UserError, printable, reading, shown


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run. None: what the backbone's recipe says (`recipes.RECIPES`). Numbers have their range."""

    # what is run, on what, to where
    backbone: str = "microsoft/deberta-v3-xsmall"  # folder, attached Kaggle input, or hub name
    train: str = "competition"  # CSV path, "sample", or "competition" (the attached Kaggle input)
    test: str = "competition"  # the same
    extra_train: str | None = None  # CSV of more rows, for training alone; several: a list, or with commas between them
    out: str = "auto"  # run folder; auto: /kaggle/working on Kaggle, else runs/<backbone>
    # rows and folds
    max_train_rows: Annotated[int, 0, 10**9] = 0  # rows of the training file to use, chosen by content; 0: all
    num_folds: Annotated[int, 2, 100] = 10  # stratified folds grouped by prompt
    folds: tuple[int, ...] = (0,)  # folds to validate on, one model each; (0,) is a 90/10 split
    seed: Annotated[int, 0, 2**32 - 1] = 42  # of training: first weights of the head, order of the rows, dropout
    fold_seed: Annotated[int | None, 0, 2**32 - 1] = None  # of max_train_rows, folds and baselines; None: as seed
    num_seeds: Annotated[int, 1, 100] = 1  # models a fold, with seeds seed, seed + 1, ...; predictions averaged
    # tokens
    text_cleaning: Literal["none", "ascii"] = "none"  # see `tokenization.clean_text`
    max_length: Annotated[int, 16, 65_536] = 512  # tokens of a side, or of a cross-encoder's pair of sides
    # model
    architecture: Literal["siamese", "cross"] = "siamese"  # each answer by itself, or both in one sequence
    init_from: str | None = None  # a reward model's folder, attached input or hub name: used in place of `backbone`
    head: Literal["symmetric", "concat"] = "symmetric"  # concat: the original study's
    # the baseline to improve on
    start_from: Literal["structure_ensemble", "structure_tfidf", "structure_logistic", "none"] | None = None
    dropout: Annotated[float | None, 0, 0.9] = None  # in encoder and head
    # training
    num_epochs: Annotated[int | None, 1, 1000] = None  # passes over the training rows
    learning_rate: Annotated[float | None, 0, 1] = None  # peak rate of the encoder's top layer
    layer_decay: Annotated[float | None, 0.1, 1] = None  # a layer's rate as a share of that of the layer above
    head_learning_rate: Annotated[float | None, 0, 1] = None  # peak rate of the head; its correction has 0.4 of it
    batch_size: Annotated[int, 1, 65_536] = 32  # pairs in one optimizer step
    max_tokens_per_micro_step: Annotated[int | None, 16, 10**9] = None  # most tokens of a micro-batch; bounds memory
    gradient_checkpointing: bool = False  # activations computed twice: a third more time, far less memory
    validations_per_epoch: Annotated[int | None, 1, 1000] = None  # at equal distances, the last at the epoch's end
    schedule: Literal["linear", "plateau"] | None = None  # to 0, or a tenth after 2 validations without a new best
    warmup_ratio: Annotated[float | None, 0, 1] = None  # share of the steps in which the rate rises to its peak
    label_smoothing: Annotated[float | None, 0, 0.5] = None  # of the training loss, never of a reported number
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"  # auto: what the device is fast at
    num_processes: Annotated[int | None, 1, 1024] = None  # None: one for each GPU; they share the models, or one model
    time_budget_hours: Annotated[float | None, 0.001, 1000] = None  # for the whole command; None: no limit
    report_to: str = "none"  # trackers: tensorboard, wandb, mlflow, trackio, ... with commas between them; or all
    resume_from: str | None = None  # an earlier run's folder, only read: it is copied, and that run is resumed

    def __post_init__(self):
        for name, annotation in get_type_hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, _read_value(name, getattr(self, name), annotation))
        if self.fold_seed is None:
            object.__setattr__(self, "fold_seed", self.seed)
        bad = [fold for fold in self.folds if not 0 <= fold < self.num_folds]
        if bad or not self.folds or len(set(self.folds)) != len(self.folds):
            wanted = f"different whole numbers from 0 to {self.num_folds - 1} (num_folds={self.num_folds})"
            raise UserError(f"setting folds={shown(list(self.folds))}: give {wanted}.")
        if self.architecture == "cross" and self.head == "concat":
            raise UserError("setting head='concat': impossible with a cross-encoder. Set head=symmetric.")
        if self.architecture == "cross" and self.init_from is not None:
            raise UserError("setting init_from: a reward model reads one answer at a time. Set architecture=siamese.")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object], source: str = "settings") -> "RunConfig":
        """Build a config from names and values; text ("false", "1e-4", "[1,2]") is coerced to the setting's type."""
        names = [field.name for field in fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(str(name)[:80], names, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"Settings are: {', '.join(names)}."
                raise UserError(f"{source}: unknown setting {shown(name)}. {hint}")
        return cls(**settings)

    @classmethod
    def from_namespace(cls, namespace: dict[str, object]) -> "RunConfig":
        """Build a config from a notebook's `globals()`, right after its parameters cell.

        Every plain value defined so far is taken as a setting, so that a mistyped name which papermill injected stops
        the run. When the cell is run again, later cells have defined names of their own: then a name that is no setting
        is refused only where it is close to one.
        """
        plain, ipythons = (str, int, float, bool, list, tuple, dict, types.NoneType), ("In", "Out")
        settings = {k: v for k, v in namespace.items()
                    if isinstance(v, plain) and not k.startswith("_") and k not in ipythons}  # fmt: skip
        if namespace.get("_prefcls_config_read"):
            names = [field.name for field in fields(cls)]
            settings = {k: v for k, v in settings.items() if difflib.get_close_matches(k, names, n=1, cutoff=0.8)}
        namespace["_prefcls_config_read"] = True
        return cls.from_mapping(settings, source="notebook parameters")

    @classmethod
    def from_yaml(cls, path: str | Path | None, overrides: Mapping[str, object]) -> "RunConfig":
        """Read settings from a YAML file (or none), then apply `overrides` on top."""
        settings = {} if path is None else read_settings(Path(path))
        return cls.from_mapping({**settings, **overrides}, source=str(path or "--set"))

    def with_recipe(self, recipe: Mapping[str, object]) -> "RunConfig":
        """Fill every setting that is still None from the backbone's recipe."""
        return replace(self, **{k: v for k, v in recipe.items() if getattr(self, k) is None})

    def to_dict(self) -> dict:
        """Plain values, as they are stored in config.json."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def read_settings(path: Path) -> dict[str, object]:
    """Settings by name as a YAML file has them, every value a text or a list of texts, not yet checked."""
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    hint = f"Did you mean {path.with_name(near[0])}?" if near else "Check the path."
    with reading(path, "Write one `setting: value` a line.", hint):
        # BaseLoader leaves all values texts, as --set does: YAML reads 0256 as 174, 8:30 as 510 and `no` as false
        settings = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected lines of `setting: value`, found a {type(settings).__name__}.")
    return settings


def _read_value(name: str, value: object, annotation: object) -> object:
    """`value` coerced to the type of its annotation, one of its choices and within its range; else a UserError."""
    annotation, *limits = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    optional = types.NoneType in get_args(annotation)
    annotation = get_args(annotation)[0] if optional else annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    text = value.strip().lower() if isinstance(value, str) else value
    if optional and (text is None or text in ("", "none", "null", "~")) and text not in choices:
        return None
    if choices:
        value = _coerce(name, "no" if value is False else value, str).lower()  # YAML's `no`, as papermill reads it
        if value not in choices:
            raise UserError(f"setting {name}={shown(value)}: choose one of {', '.join(choices)}.")
        return value
    value = _coerce(name, value, annotation)
    if limits and not limits[0] <= value <= limits[1]:  # true for NaN
        raise UserError(f"setting {name}={value!r}: expected a number from {limits[0]} to {limits[1]}.")
    return value


def _coerce(name: str, value: object, kind: object) -> object:
    """`value` as a `kind`, where it is one or a text that names one; else a UserError."""
    value = value.strip() if isinstance(value, str) else value
    if kind == tuple[int, ...]:
        if isinstance(value, str):
            value = [item for item in value.removeprefix("[").removesuffix("]").split(",") if item.strip()]
        return tuple(_coerce(name, item, int) for item in (value if isinstance(value, (list, tuple)) else [value]))
    words = {int: "a whole number like 256", float: "a number like 0.5", bool: "true or false", str: "text"}
    error = UserError(f"setting {name}={shown(value)}: expected {words[kind]}.")
    if kind is str:
        if isinstance(value, (list, tuple)) and all(isinstance(item, (str, Path)) for item in value):
            value = ",".join(map(str, value))
        number = isinstance(value, int) and not isinstance(value, bool)  # papermill's -p out 2024
        if not (number or isinstance(value, (str, Path))) or not str(value) or printable(str(value)) != str(value):
            raise error
        return str(value)
    if kind is bool and isinstance(value, str):
        value = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(value.lower())
    with suppress(TypeError, ValueError, OverflowError):
        if isinstance(value, bool) == (kind is bool) and (kind is not int or float(value).is_integer()):
            return kind(float(value))
    raise error
