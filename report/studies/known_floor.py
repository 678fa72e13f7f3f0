"""Training on rows whose Bayes log loss is known: what leaves a deep ELECTRA at the prior, and what cures it.

    OMP_NUM_THREADS=1 python -m report.studies.known_floor --out runs/floor --rows 24000 --seeds 42 43 44

A scaled ELECTRA of 24 layers, on a CPU; one thread is faster than two on layers this narrow: five to seven minutes a
run. A run that is complete is not made again, and one that was stopped is resumed.

Rows come in the competition's columns. Answers are made of nonsense words; each word has a known worth, and with d the
worth of answer A minus that of B (and a little for length), the label is drawn from

    P(A wins), P(B wins), P(tie) = softmax(d, -d, 0)

So no model can be expected to have less than the mean entropy of that distribution, the Bayes log loss (`floor` in the
table). The encoder starts from random weights, since a pretrained one already carries its input through 24 layers.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ElectraConfig, ElectraModel, PreTrainedTokenizerFast, set_seed

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, PROMPT, RESPONSES
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import read_json, write_json
from prefcls_lib.training.validation import COLLAPSED_SPREAD

GOOD, BAD, NEUTRAL = 20, 20, 20  # words worth +1, -1 and 0
WORTH = 0.4  # of one good word, in logits
WORDS = (4, 9)  # in an answer, from and below; few, so that thousands of steps are cheap
LENGTH_WORTH = 0.04  # of one word more: what the structure features can see
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

WIDTH, LAYERS = 32, 24
RATE_SCALE = 16.0  # narrow layers bear higher rates than 1,024 wide ones, whose rates stand below; 8 and 16 learn alike

# The study's model has no symmetric head, and its two epochs have one rate and no warm-up.
ORIGINAL = {"head": "concat", "num_epochs": 2, "learning_rate": 1e-5, "warmup_ratio": 0.0,
            "head_learning_rate": 1e-5, "layer_decay": 1.0, "schedule": "plateau", "validations_per_epoch": 1,
            "label_smoothing": 0.1, "dropout": 0.1}  # fmt: skip
OURS = {"learning_rate": 3e-5}  # and ELECTRA's recipe
VARIANTS = {
    "original": ORIGINAL,
    "original, warm-up": {**ORIGINAL, "warmup_ratio": 0.1},
    "original, rate 3e-5": {**ORIGINAL, "learning_rate": 3e-5, "head_learning_rate": 3e-5},
    "original, dropout 0": {**ORIGINAL, "dropout": 0.0},
    "ours": OURS,
    "ours, dropout 0.1": {**OURS, "dropout": 0.1},
}


def make_words() -> tuple[list[str], np.ndarray]:
    """The vocabulary, and the worth (W,) of each word."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [first + second for first in syllables for second in syllables][:: len(syllables) // 3]
    worth = np.concatenate([np.full(GOOD, WORTH), np.full(BAD, -WORTH), np.zeros(NEUTRAL)])
    return words[: len(worth)], worth


def make_rows(count: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """`count` rows in the competition's columns, and the distribution (N, 3) that each label was drawn from."""
    words, worth = make_words()
    random = np.random.default_rng(seed)
    table, probs = [], np.empty((count, len(LABEL_COLUMNS)))
    for number in range(count):
        sides = [random.choice(len(words), size=random.integers(*WORDS)) for _ in RESPONSES]
        value = [worth[side].sum() + LENGTH_WORTH * len(side) for side in sides]
        d = value[0] - value[1]
        logits = np.array([d, -d, 0.0])
        probs[number] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        winner = random.choice(len(LABEL_COLUMNS), p=probs[number])
        prompt = " ".join(words[i] for i in random.choice(len(words), size=2))
        answers = [" ".join(words[i] for i in side) for side in sides]
        cells = [json.dumps([text]) for text in (prompt, *answers)]
        table.append([number, *cells, *(int(i == winner) for i in range(len(LABEL_COLUMNS)))])
    return pd.DataFrame(table, columns=[ID, PROMPT, *RESPONSES, *LABEL_COLUMNS]), probs


def make_backbone(folder: Path, seed: int) -> None:
    """An ELECTRA with random weights, and a tokenizer with one token a word.

    The weights start so that a layer's gain is ELECTRA-large's (0.02 at 1,024 wide).
    """
    words, _ = make_words()
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    set_seed(seed)
    config = ElectraConfig(
        vocab_size=len(vocabulary), num_hidden_layers=LAYERS, max_position_embeddings=128, pad_token_id=0,
        hidden_size=WIDTH, embedding_size=WIDTH, num_attention_heads=4, intermediate_size=4 * WIDTH,
        initializer_range=0.02 * math.sqrt(1024 / WIDTH),
    )  # fmt: skip
    ElectraModel(config).save_pretrained(folder)


def prepare(out: Path, count: int, seed: int) -> None:
    """Write the rows, their distributions and, last, the encoder into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows, probs = make_rows(count, seed)
    rows.to_csv(out / "train.csv", index=False)
    rows.drop(columns=list(LABEL_COLUMNS)).head(100).to_csv(out / "test.csv", index=False)
    np.save(out / "probs.npy", probs)
    make_backbone(out / "backbone", seed)


def run_variant(name: str, out: Path, seed: int) -> dict:
    """Train one variant on fold 0 of 10 and compare it with the Bayes log loss on the same validation rows."""
    changes = {key: value * RATE_SCALE if key.endswith("learning_rate") else value
               for key, value in VARIANTS[name].items()}  # fmt: skip
    run = out / name.replace(" ", "_").replace(",", "")
    folder = steps.run(RunConfig(
        backbone=str(out / "backbone"), train=str(out / "train.csv"), test=str(out / "test.csv"), out=str(run),
        start_from="none",  # since the planted signal is for the encoder to find
        seed=seed, max_length=32, **changes,
    ))  # fmt: skip
    result = read_json(folder / "result.json")
    oof, history = read_table(folder / "oof.csv"), read_table(folder / "history.csv")
    known = np.load(out / "probs.npy")[oof[ID].astype(int)]
    labels, probs = oof["label"].to_numpy(), oof[list(LABEL_COLUMNS)].to_numpy()
    spread = float(history["encoder_spread"].iloc[-1])
    return {
        "variant": name, "seed": seed, "log_loss": log_loss(labels, probs), "floor": log_loss(labels, known),
        "prior": next(line["log_loss"] for line in result["baselines"] if line["model"] == "prior"),
        "encoder_spread": spread, "collapsed": spread < COLLAPSED_SPREAD,
        "steps": int(history["step"].iloc[-1]), "seconds": result["seconds"],
    }  # fmt: skip


def main() -> None:
    """Make rows and backbone, run the variants that are not done yet, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="each has rows and weights of its own")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:  # the same bytes each time, so that a run folder of other rows is refused
        out = arguments.out / f"seed{seed}"
        prepare(out, arguments.rows, seed)
        for name in arguments.variants:
            results.append(run_variant(name, out, seed))
            write_json(arguments.out / "known_floor.json", {"lines": results})
            print(pd.DataFrame(results).to_string(index=False, float_format="{:.4f}".format), flush=True)


if __name__ == "__main__":
    main()
