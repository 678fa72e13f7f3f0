"""A fold's model on disk: encoder and tokenizer as transformers saves them, head, and all that predicting needs.

model/fold0/  config.json model.safetensors tokenizer.json ...   AutoModel and AutoTokenizer load these
              head.safetensors                                   the head's weights, and a reward model's pooler
              preference.json                                    the run's settings
              baseline/                                          the baseline whose log-odds its correction is added to

The model folder of a run without a network (`prefcls ladder`) is that of a baseline.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file

from prefcls_lib.baselines.columns import BaselineInputs
from prefcls_lib.baselines.out_of_fold import BaselineMean
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone, load_encoder, quiet_transformers
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.reward import load_reward_model, make_layers
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError, read_json, reading, sha256, write_json


@dataclass(frozen=True)
class NetworkInputs:
    """What networks read of rows; `baseline`: what the baseline reads that they start from, if they do."""

    examples: Examples
    baseline: BaselineInputs | None

    def take(self, index: np.ndarray) -> "NetworkInputs":
        """The rows at `index` (positions)."""
        return NetworkInputs(self.examples.take(index), self.baseline and self.baseline.take(index))


@dataclass(frozen=True)
class SavedNetwork:
    """A network read back from its folder."""

    model: PreferenceModel
    backbone: Backbone
    config: RunConfig
    baseline: BaselineMean | None

    def read_inputs(self, rows: pd.DataFrame) -> NetworkInputs:
        """Token ids of rows from `loading.read_rows`: the same for all models of a run."""
        settings = (self.config.max_length, self.config.text_cleaning, self.config.architecture)
        examples = encode_rows(rows, self.backbone.tokenizer, *settings)
        return NetworkInputs(examples, self.baseline and self.baseline.read_inputs(rows))

    def predict_proba(self, inputs: NetworkInputs, label: str = "") -> np.ndarray:
        """Probabilities (N, 3) of what `read_inputs` has read, on this machine's device, in the precision of training.

        `label` shows a progress bar with this name.
        """
        examples = inputs.examples
        if self.baseline is not None:
            examples = replace(examples, offsets=self.baseline.predict(inputs.baseline).astype(np.float32))
        accelerator = make_accelerator(self.config.mixed_precision)
        model = self.model.to(accelerator.device)
        probs, _ = predict_proba(model, examples, accelerator, label)
        return probs


def load_model(folder: Path) -> SavedNetwork | BaselineMean:
    """A fold's model from its folder: a network of `prefcls run`, or a baseline of `prefcls ladder`.

    Its files must be those that were saved: fold.json, where the folder has it, knows their SHA-256.
    """
    known = read_json(folder / "fold.json").get("sha256", {}) if (folder / "fold.json").is_file() else {}
    with reading(folder, "Copy the run folder again."):
        for name, wanted in known.items():
            if not (folder / name).is_file() or sha256(folder / name) != wanted:
                raise UserError(f"{folder / name}: is missing, damaged or changed. Copy the run folder again.")
        if not (folder / "preference.json").exists():
            return BaselineMean.load(folder)
        config = RunConfig(**read_json(folder / "preference.json")["settings"])
        backbone = load_backbone(str(folder), config.max_length)
        encoder = load_encoder(folder, 0.0)
        layers = make_layers(encoder.config, backbone.tokenizer.tokenizer) if config.init_from is not None else ()
        model = PreferenceModel(config, encoder, *layers)
        weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        model.load_state_dict(weights | load_file(folder / "head.safetensors"))
        baseline = None if config.start_from == "none" else BaselineMean.load(folder / "baseline")
    return SavedNetwork(model, backbone, config, baseline)


def build_model(path: Path, config: RunConfig) -> PreferenceModel:
    """The pretrained encoder in `path` with a new head, as `config` says; or, with `init_from`, a reward model."""
    dropout = config.dropout or 0.0
    parts = load_reward_model(path, dropout) if config.init_from is not None else [load_encoder(path, dropout)]
    return PreferenceModel(config, *parts)


def save_model(
    folder: Path, model: PreferenceModel, backbone: Backbone, config: RunConfig,
    baseline: BaselineMean | None = None,
) -> None:  # fmt: skip
    """Write a fold's model into `folder`; `baseline`: what it starts from, if it does."""
    folder.mkdir(exist_ok=True)
    with quiet_transformers():
        model.encoder.save_pretrained(folder)
    backbone.tokenizer.tokenizer.save_pretrained(folder)
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    save_file(weights, folder / "head.safetensors")
    if baseline is not None:
        baseline.save(folder / "baseline")
    write_json(folder / "preference.json", {"settings": config.to_dict()})
