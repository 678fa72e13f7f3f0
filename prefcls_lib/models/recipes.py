"""One training recipe for each type of backbone, and the backbones' names on the hub."""

from transformers import PretrainedConfig

# Short names, and the names under which the hub has them.
HUB_NAMES = {
    "deberta-v3-xsmall": "microsoft/deberta-v3-xsmall",
    "roberta-base": "FacebookAI/roberta-base",
    "electra-large": "google/electra-large-discriminator",
    "deberta-v3-small": "microsoft/deberta-v3-small",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "deberta-v3-large": "microsoft/deberta-v3-large",
    "modernbert-base": "answerdotai/ModernBERT-base",
    "modernbert-large": "answerdotai/ModernBERT-large",
    "ettin-encoder-150m": "jhu-clsp/ettin-encoder-150m",
    "ettin-encoder-400m": "jhu-clsp/ettin-encoder-400m",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "mdeberta-v3-base": "microsoft/mdeberta-v3-base",
    "all-mpnet-base-v2": "sentence-transformers/all-mpnet-base-v2",
}

# One recipe for each model type, see `choose_recipe`; `None` settings of a RunConfig are filled from it.
# max_tokens_per_micro_step: tokens held for one backward pass; it bounds memory and changes no result.
# No label smoothing: it was worse than none on a baseline (report/log.md).
_COMMON = {"schedule": "linear", "warmup_ratio": 0.1, "label_smoothing": 0.0, "layer_decay": 1.0,
           "head_learning_rate": 5e-4, "dropout": 0.0, "max_tokens_per_micro_step": 8192,
           "start_from": "structure_ensemble"}  # fmt: skip
RECIPES = {
    # DeBERTa-v3-xsmall is small and may start slowly: the highest rate of the three backbones; not measured
    "deberta-v2": {**_COMMON, "learning_rate": 4e-5, "num_epochs": 3, "validations_per_epoch": 4},
    # RoBERTa-base: in the original study the second epoch was the best
    "roberta": {**_COMMON, "learning_rate": 2e-5, "num_epochs": 2, "validations_per_epoch": 4},
    # ELECTRA-large can collapse: warm-up, and 0.9 times the rate in the next lower layer, as its authors have; memory:
    # 0.98 MB a token, so 6,144 fit into a T4's 14.6 GiB beside 6 GB of weights and optimizer, as computed
    "electra": {**_COMMON, "learning_rate": 3e-5, "num_epochs": 2, "validations_per_epoch": 2, "layer_decay": 0.9,
                "max_tokens_per_micro_step": 6144},
    # the demo's MiniLM (384 wide) is already a sentence encoder: one epoch, for a gain of two was not shown; its rate
    # was the best of three on 2,000 rows, two seeds (report/log.md)
    "bert": {**_COMMON, "learning_rate": 1e-4, "num_epochs": 1, "validations_per_epoch": 2},
    # within the range that its authors searched on GLUE, 1e-5 to 8e-5 (Warner et al. 2024, https://arxiv.org/abs/2412.13663)
    "modernbert": {**_COMMON, "learning_rate": 5e-5, "num_epochs": 2, "validations_per_epoch": 4},
    # RoBERTa-base's architecture and rate; the multilingual vocabulary only enlarges the embedding
    "xlm-roberta": {**_COMMON, "learning_rate": 2e-5, "num_epochs": 2, "validations_per_epoch": 4},
    # RoBERTa-base's size, and one epoch as for MiniLM, the other sentence encoder; this rate was better than 2e-5 on
    # 2,000 rows, two seeds (report/log.md). Its attention is not fused: a token takes twice RoBERTa's memory
    "mpnet": {**_COMMON, "learning_rate": 6e-5, "num_epochs": 1, "validations_per_epoch": 2},
}  # fmt: skip
# From this width on, what differs from the model type's narrowest: MiniLM, DeBERTa-v3-xsmall, ModernBERT-base.
WIDE_RECIPES = {
    # within the range of its authors, 2e-5 to 5e-5 (Devlin et al. 2019, https://arxiv.org/abs/1810.04805)
    "bert": {768: {"learning_rate": 3e-5}},
    "deberta-v2": {
        # deberta-v3-base and mdeberta-v3-base: the rate of both model cards' examples; deberta-v3-small is as wide
        768: {"learning_rate": 2e-5, "num_epochs": 2, "max_tokens_per_micro_step": 4096},
        # deberta-v3-large: with 0.9 a layer the upper middle layers have the 5e-6 to 1e-5 of its authors
        # (He et al. 2021, https://arxiv.org/abs/2111.09543)
        1024: {"learning_rate": 2e-5, "layer_decay": 0.9, "num_epochs": 2, "max_tokens_per_micro_step": 1536},
    },
    # modernbert-large and ettin-encoder-400m: a lower rate of the same range
    "modernbert": {1024: {"learning_rate": 3e-5, "max_tokens_per_micro_step": 4096}},
}


def choose_recipe(config: PretrainedConfig) -> dict[str, object]:
    """The default recipe of a configuration: by its model type and its width."""
    recipe = RECIPES[config.model_type]
    for width, changes in WIDE_RECIPES.get(config.model_type, {}).items():
        recipe = {**recipe, **changes} if config.hidden_size >= width else recipe
    return recipe
