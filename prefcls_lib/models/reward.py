"""Start from a reward model: its encoder, its pooler, and its score, which becomes a linear skip of the head.

A reward model is a sequence-classification checkpoint with one output. It scores one answer, from the hidden state h of
the first token: s = w f(W h + b) + c. Trained on A and B of the same prompt, s(A) - s(B) is its logit of "A wins"
(Bradley and Terry 1952). f(W h + b) becomes the embedding of a side and w the head's skip, so the untrained model ranks
answers exactly as the reward model does. BERT and ELECTRA have token types: 0 for prompts, 1 for answers.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.activations import ACT2FN

from prefcls_lib.models.backbones import load_encoder, read_config, read_pretrained
from prefcls_lib.runtime.files import UserError

# model type: W and w in its sequence-classification model
LAYERS = {
    "deberta-v2": ("pooler.dense", "classifier"),
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
}


class RewardPooler(nn.Module):
    """f(W h + b) of the first token, in fp32 whatever the autocast around it."""

    def __init__(self, hidden_size: int, activation: str, separator: int | None = None):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = activation
        self.separator = separator  # id of the token that ends a text, where the reward model has token types

    def forward(self, hidden: Tensor) -> Tensor:
        """Embeddings (S, H) fp32 of hidden states (S, T, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return ACT2FN[self.activation](self.dense(hidden[:, 0].float()))

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What the encoder takes beside ids (S, T): the parity of the separators before a token, or nothing."""
        if self.separator is None:
            return {}
        ends = (input_ids == self.separator).long()
        return {"token_type_ids": (ends.cumsum(dim=1) - ends) % 2}


def is_reward_model(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a checkpoint to start from."""
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return is_classifier and config.num_labels == 1 and config.model_type in LAYERS


def check_reward_model(path: Path, config: PretrainedConfig) -> None:
    """Refuse a checkpoint that is no reward model."""
    if not is_reward_model(config):
        kind = ", ".join(config.architectures or [f"of model type {config.model_type}"])
        raise UserError(
            f"setting init_from: {path} is {kind}, with {config.num_labels} outputs. A reward model is a "
            f"sequence-classification checkpoint with one output, of model type {', '.join(LAYERS)}; to start from an "
            "encoder, name it as the backbone."
        )


def load_reward_model(path: Path, dropout: float) -> tuple[PreTrainedModel, RewardPooler, nn.Linear]:
    """Encoder, pooler and score (H -> 1, without bias: no difference of scores has one) of a reward model's folder."""
    config = read_config(path)
    check_reward_model(path, config)
    model = load_encoder(path, dropout, AutoModelForSequenceClassification)
    dense, last = (model.get_submodule(name) for name in LAYERS[config.model_type])
    pooler, score = make_layers(config, read_pretrained(AutoTokenizer, path))
    pooler.dense, score.weight = dense, last.weight
    encoder = model.base_model
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # BERT's is used as `pooler`
    return encoder, pooler.train(), score


def make_layers(config: PretrainedConfig, tokenizer: Tokenizer) -> tuple[RewardPooler, nn.Linear]:
    """Pooler and score for an encoder with this configuration and tokenizer, their weights not yet set."""
    has_types = getattr(config, "type_vocab_size", 0) > 1
    activations = {"electra": "gelu", "deberta-v2": getattr(config, "pooler_hidden_act", None)}
    activation = activations.get(config.model_type, "tanh")
    pooler = RewardPooler(config.hidden_size, activation, tokenizer.sep_token_id if has_types else None)
    return pooler, nn.Linear(config.hidden_size, 1, bias=False)
