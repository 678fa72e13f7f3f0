"""A fold's model on disk: encoder and tokenizer as transformers saves them, head, and all that predicting needs.

model/fold0/  config.json model.safetensors tokenizer.json ...   AutoModel and AutoTokenizer load these
              head.safetensors                                   the head's weights, and a reward model's pooler
              preference.json                                    text settings, feature scaler
              baseline/                                          the baseline whose log-odds its correction is added to
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.out_of_fold import BaselineMean
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount
from prefcls_lib.data.features import FeatureScaler, compute_features
from prefcls_lib.data.schema import MARGIN
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone, load_encoder, quiet_transformers
from prefcls_lib.models.network import PreferenceHead, PreferenceModel
from prefcls_lib.models.predict import predict_proba, score_margins
from prefcls_lib.models.reward import RewardPooler, check_reward_model, load_reward_model
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError, read_json, write_json


@dataclass(frozen=True)
class NetworkInputs:
    """What networks read of rows; `baseline`: what the baseline reads that they start from, if they do."""

    examples: Examples
    baseline: BaselineInputs | None

    def take(self, index: np.ndarray) -> "NetworkInputs":
        """The rows at `index` (positions)."""
        return NetworkInputs(self.examples.take(index), self.baseline and self.baseline.take(index))


@dataclass
class SavedNetwork:
    """A network read back from its folder, with the settings that its inputs need.

    `tokens` counts what has passed through the encoder so far.
    """

    model: PreferenceModel
    backbone: Backbone
    scaler: FeatureScaler | None
    architecture: str
    max_length: int
    text_cleaning: str
    mixed_precision: str
    offset: BaselineMean | None
    tokens: TokenCount = field(default_factory=TokenCount)

    def read_inputs(self, rows: pd.DataFrame) -> NetworkInputs:
        """Token ids and raw structure features of rows from `data.read_rows`: the same for a run's models."""
        encoded = encode_rows(rows, self.backbone.tokenizer, self.max_length, self.text_cleaning, self.architecture)
        features = compute_features(rows) if self.scaler or self.offset else None
        baseline = self.offset and read_inputs(rows, features, self.offset.reads_text)
        return NetworkInputs(Examples(encoded.token_ids, encoded.sides, self.scaler and features), baseline)

    def predict_proba(self, rows: pd.DataFrame, inputs: NetworkInputs | None = None, label: str = "") -> np.ndarray:
        """Probabilities (N, 3) of rows, on this machine's device and in the precision it was trained in.

        Args:
            rows: from `loading.read_rows`.
            inputs: what `read_inputs` gave for these rows, where several models share it.
            label: shows a progress bar with this name.
        """
        inputs = inputs or self.read_inputs(rows)
        examples = inputs.examples
        if self.offset is not None:
            examples = replace(examples, offsets=self.offset.predict(inputs.baseline).astype(np.float32))
        if self.scaler is not None:
            examples = replace(examples, features=self.scaler.transform(examples.features).astype(np.float32))
        accelerator = make_accelerator(self.mixed_precision)
        model = self.model.to(accelerator.device)
        probs, tokens = predict_proba(model, examples, accelerator, self.backbone.tokenizer.pad_id, label)
        self.tokens += tokens
        return probs

    def add_margins(self, rows: pd.DataFrame, label: str = "") -> pd.DataFrame:
        """`rows` with a reward model's margins, see `load_scorer`; each different side is scored once.

        In this process alone, also where there are others.
        """
        every, examples = make_accelerator(self.mixed_precision), self.read_inputs(rows).examples
        alone = SimpleNamespace(
            device=every.device, autocast=every.autocast, process_index=0, num_processes=1, is_main_process=True
        )
        model = self.model.to(every.device)
        margins, tokens = score_margins(model, examples, alone, self.backbone.tokenizer.pad_id, label)
        self.tokens += tokens
        return rows.assign(**{MARGIN: margins})


@dataclass(frozen=True)
class SavedBaseline:
    """The ladder's entry read back from its folder, with the methods of `SavedNetwork`."""

    baseline: BaselineMean
    tokens: TokenCount = field(default_factory=TokenCount)

    def read_inputs(self, rows: pd.DataFrame) -> BaselineInputs:
        """What the baselines read of rows from `loading.read_rows`: the same for a run's models."""
        return read_inputs(rows, with_text=self.baseline.reads_text)

    def predict_proba(self, rows: pd.DataFrame, inputs: BaselineInputs | None = None, label: str = "") -> np.ndarray:
        """Probabilities (N, 3) of rows, see `SavedNetwork.predict_proba`."""
        return self.baseline.predict_proba(inputs or self.read_inputs(rows))


def load_fold_model(folder: Path) -> SavedNetwork | SavedBaseline:
    """A fold's model from its folder: a network of `prefcls run`, or the baselines of `prefcls ladder`.

    Raises:
        UserError: a file is missing or broken.
    """
    if not (folder / "baseline.json").exists():
        return _load_network(folder)
    return SavedBaseline(BaselineMean.load(folder))


def load_scorer(config: RunConfig) -> SavedNetwork:
    """The reward model of `init_from`, to score answers with: its encoder and its own score, no baseline, no features.

    Raises:
        UserError: it is nowhere, or it is no reward model.
    """
    backbone = load_backbone(config.init_from, config.max_length)
    check_reward_model(backbone.path, backbone.config)
    model = build_model(backbone.path, replace(config, structure_features=False))
    settings = (config.architecture, config.max_length, config.text_cleaning, config.mixed_precision)
    return SavedNetwork(model, backbone, None, *settings, None)


def build_model(path: Path, config: RunConfig) -> PreferenceModel:
    """The pretrained encoder in `path` with a new head, as `config` says; or, with `init_from`, a reward model."""
    dropout = config.dropout or 0.0
    if config.init_from is None:
        return _assemble(load_encoder(path, dropout), config)
    encoder, pooler, score = load_reward_model(path, dropout)
    return _assemble(encoder, config, pooler, score)


def _assemble(
    encoder: PreTrainedModel, config: RunConfig, pooler: RewardPooler | None = None, skip: nn.Linear | None = None
) -> PreferenceModel:
    head = PreferenceHead(
        encoder.config.hidden_size,
        config.head == "symmetric",
        config.structure_features,
        config.dropout or 0.0,  # None: no recipe, to predict with
        config.architecture,
        config.start_from not in ("none", None),
    )
    head.skip = skip
    return PreferenceModel(encoder, head, config.pooling, pooler)


def save_model(
    folder: Path,
    model: PreferenceModel,
    backbone: Backbone,
    scaler: FeatureScaler | None,
    config: RunConfig,
    offset: BaselineMean | None = None,
) -> None:
    """Write a fold's model into `folder`."""
    folder.mkdir(exist_ok=True)
    try:
        with quiet_transformers():
            model.encoder.save_pretrained(folder)
        backbone.tokenizer.tokenizer.save_pretrained(folder)
        weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
        save_file(weights, folder / "head.safetensors")
        if offset is not None:
            offset.save(folder / "baseline")
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:  # so safetensors and tokenizers
            raise OSError(str(error)) from error  # say that the disk is full
        raise
    state = {
        "architecture": config.architecture,
        "head": config.head,
        "pooling": config.pooling,
        "max_length": config.max_length,
        "text_cleaning": config.text_cleaning,
        "mixed_precision": config.mixed_precision,
        "reward_activation": None if model.pooler is None else model.pooler.activation,
        "feature_scaler": None if scaler is None else scaler.to_dict(),
        "start_from": "none" if offset is None else config.start_from,
    }
    if model.pooler is not None and model.pooler.separator is not None:
        state["reward_separator"] = model.pooler.separator
    write_json(folder / "preference.json", state)


def _load_network(folder: Path) -> SavedNetwork:
    """Read back what `save_model` wrote.

    Raises:
        UserError: a file is missing or broken.
    """
    state = read_json(folder / "preference.json")
    backbone = load_backbone(str(folder), state["max_length"])
    start_from = state.get("start_from", "none")  # a run that is older than the setting had no baseline
    offset = None if start_from == "none" else BaselineMean.load(folder / "baseline")
    try:
        scaler = state["feature_scaler"] and FeatureScaler.from_dict(state["feature_scaler"])
        config = RunConfig(
            architecture=state["architecture"],
            head=state["head"],
            pooling=state["pooling"],
            structure_features=scaler is not None,
            start_from=start_from,
        )
        encoder, pooler, skip = load_encoder(folder, 0.0), None, None
        if state["reward_activation"] is not None:
            hidden_size = encoder.config.hidden_size
            pooler = RewardPooler(hidden_size, state["reward_activation"], state.get("reward_separator"))
            skip = nn.Linear(hidden_size, 1, bias=False)
        model = _assemble(encoder, config, pooler, skip)
        weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        model.load_state_dict(weights | load_file(folder / "head.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the saved model cannot be read ({error}). Copy the run folder again.") from error
    settings = (state[name] for name in ("architecture", "max_length", "text_cleaning", "mixed_precision"))
    return SavedNetwork(model, backbone, scaler, *settings, offset)
