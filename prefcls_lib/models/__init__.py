"""The network: from a backbone's name to probabilities.

Open `backbones` first (a checked encoder and tokenizer; `recipes` has its training settings), then `network` (shared
encoder and symmetric head), `predict`, and `saved` (a model on disk). `reward` starts from a reward model.
"""
