"""A fold's model on disk: encoder and tokenizer as transformers saves them, head, and all that predicting needs.

model/fold0/  config.json model.safetensors tokenizer.json ...   AutoModel and AutoTokenizer load these
              head.safetensors                                   the head's weights
              preference.json                                    layout, text settings, feature scaler
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefcls_lib.backbones import Backbone, load_backbone, load_encoder, quiet_transformers
from prefcls_lib.config import RunConfig
from prefcls_lib.features import FeatureScaler
from prefcls_lib.files import UserError, read_json, write_json
from prefcls_lib.model import PreferenceHead, PreferenceModel


@dataclass(frozen=True)
class SavedModel:
    """A model read back from its folder, with the settings that its inputs need."""

    model: PreferenceModel
    backbone: Backbone
    scaler: FeatureScaler | None
    max_length: int
    text_cleaning: str
    mixed_precision: str


def build_model(backbone_path: Path, config: RunConfig) -> PreferenceModel:
    """The pretrained encoder with a new head, as `config` says."""
    dropout = config.dropout or 0.0  # None: no recipe, to predict with
    encoder = load_encoder(backbone_path, dropout)
    head = PreferenceHead(encoder.config.hidden_size, config.head == "symmetric", config.structure_features, dropout)
    return PreferenceModel(encoder, head, config.pooling)


def save_model(
    folder: Path, model: PreferenceModel, backbone: Backbone, scaler: FeatureScaler | None, config: RunConfig
) -> None:
    """Write a fold's model into `folder`, which must exist."""
    try:
        with quiet_transformers():
            model.encoder.save_pretrained(folder)
        backbone.tokenizer.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous().cpu() for k, v in model.head.state_dict().items()}, folder / "head.safetensors")
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:  # so safetensors and tokenizers
            raise OSError(str(error)) from error  # say that the disk is full
        raise
    state = {
        "head": config.head,
        "pooling": config.pooling,
        "max_length": config.max_length,
        "text_cleaning": config.text_cleaning,
        "mixed_precision": config.mixed_precision,
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
            head=state["head"],
            pooling=state["pooling"],
            structure_features=scaler is not None,
        )
        model = build_model(folder, config)
        model.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the saved model cannot be read ({error}). Copy the run folder again.") from error
    return SavedModel(model, backbone, scaler, state["max_length"], state["text_cleaning"], state["mixed_precision"])
