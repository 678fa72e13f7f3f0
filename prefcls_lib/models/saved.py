"""A fold's model on disk: encoder and tokenizer as transformers saves them, head, and all that predicting needs.

model/fold0/  config.json model.safetensors tokenizer.json ...   AutoModel and AutoTokenizer load these
              head.safetensors                                   the head's weights, and a reward model's pooler
              preference.json                                    layout, text settings, feature scaler
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FeatureScaler
from prefcls_lib.data.tokenization import EncodedRows, encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone, load_encoder, quiet_transformers
from prefcls_lib.models.network import PreferenceHead, PreferenceModel
from prefcls_lib.models.reward import RewardPooler, load_reward_model
from prefcls_lib.runtime.files import UserError, read_json, write_json


@dataclass(frozen=True)
class SavedModel:
    """A model read back from its folder, with the settings that its inputs need."""

    model: PreferenceModel
    backbone: Backbone
    scaler: FeatureScaler | None
    architecture: str
    max_length: int
    text_cleaning: str
    mixed_precision: str

    def encode(self, rows: pd.DataFrame) -> EncodedRows:
        """Token ids of rows, as the model was trained on."""
        return encode_rows(rows, self.backbone.tokenizer, self.max_length, self.text_cleaning, self.architecture)

    def make_examples(self, encoded: EncodedRows, features: np.ndarray | None, rows: np.ndarray | slice) -> Examples:
        """Some of the encoded rows as the model sees them; `features`: raw, of all rows."""
        scaled = None
        if self.scaler is not None:
            scaled = self.scaler.transform(features[rows]).astype(np.float32)
        return Examples(encoded.token_ids, encoded.sides[rows], scaled)


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
    )
    head.skip = skip
    return PreferenceModel(encoder, head, config.pooling, pooler)


def save_model(
    folder: Path, model: PreferenceModel, backbone: Backbone, scaler: FeatureScaler | None, config: RunConfig
) -> None:
    """Write a fold's model into `folder`, which must exist."""
    try:
        with quiet_transformers():
            model.encoder.save_pretrained(folder)
        backbone.tokenizer.tokenizer.save_pretrained(folder)
        weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
        save_file(weights, folder / "head.safetensors")
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
    }
    write_json(folder / "preference.json", state)


def load_model(folder: Path) -> SavedModel:
    """Read back what `save_model` wrote.

    Raises:
        UserError: a file is missing or broken.
    """
    state = read_json(folder / "preference.json")
    backbone = load_backbone(str(folder), state["max_length"])
    try:
        scaler = state["feature_scaler"] and FeatureScaler.from_dict(state["feature_scaler"])
        config = RunConfig(
            architecture=state["architecture"],
            head=state["head"],
            pooling=state["pooling"],
            structure_features=scaler is not None,
        )
        encoder, pooler, skip = load_encoder(folder, 0.0), None, None
        if state["reward_activation"] is not None:
            hidden_size = encoder.config.hidden_size
            pooler = RewardPooler(hidden_size, state["reward_activation"])
            skip = nn.Linear(hidden_size, 1, bias=False)
        model = _assemble(encoder, config, pooler, skip)
        weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        model.load_state_dict(weights | load_file(folder / "head.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the saved model cannot be read ({error}). Copy the run folder again.") from error
    settings = (state[name] for name in ("architecture", "max_length", "text_cleaning", "mixed_precision"))
    return SavedModel(model, backbone, scaler, *settings)
