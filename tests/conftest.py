"""Tiny pretrained encoders with real tokenizers of all kinds, made in process: no network."""

import csv
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: on a busy machine threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.doctor import checks
from prefcls_lib.pipeline.folder import read_probs
from prefcls_lib.runtime.files import read_json

KINDS = ("deberta-v2", "roberta", "electra", "bert")
MORE_KINDS = ("modernbert", "mpnet", "xlm-roberta", "mdeberta-v2")
VOCABULARY = 600
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TWO_FOLDS = ("folds=[0,1]",)  # of `finished_run`


@pytest.fixture(scope="session")
def sample_rows():
    """The first 120 shipped training rows."""
    return loading.read_rows(loading.sample_path("train"), labelled=True).head(120)


class Folders(dict):
    """kind -> folder of a checkpoint, made by `make(kind, folder)` when it is asked for first."""

    def __init__(self, prefix: Path, make: Callable[[str, Path], None]):
        super().__init__()
        self.prefix, self.make = prefix, make

    def __missing__(self, kind: str) -> Path:
        self[kind] = Path(f"{self.prefix}-{kind}")
        self.make(kind, self[kind])
        return self[kind]


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory, sample_rows) -> Folders:
    """kind -> folder with config.json, model.safetensors and tokenizer, as a hub checkpoint has them.

    The tokenizers of xlm-roberta and mdeberta-v2 saw many scripts.
    """
    texts = [turn[:1000] for name in ("prompt", "response_a") for turns in sample_rows[name] for turn in turns]
    texts += ["one ¶ two ¶ three … ... ¶ one ¶"] * 200
    many = texts[:100] + [text for text in checks.SCRIPTS.values() for _ in range(20)]

    def make(kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        tokenizer = make_tokenizer(kind, many if kind in ("xlm-roberta", "mdeberta-v2") else texts)
        tokenizer.save_pretrained(folder)
        make_encoder(kind, len(tokenizer)).save_pretrained(folder)

    return Folders(tmp_path_factory.mktemp("backbones") / "tiny", make)


@pytest.fixture(scope="session")
def tiny(backbone_folders) -> Path:
    """The quickest of them, where the kind does not matter."""
    return backbone_folders["bert"]


@pytest.fixture(scope="session")
def reward_folders(backbone_folders, tmp_path_factory) -> Folders:
    """kind -> folder of a reward model: a sequence-classification checkpoint with one output, and its tokenizer."""

    def make(kind: str, folder: Path) -> None:
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(backbone_folders[kind], num_labels=1)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                torch.nn.init.normal_(parameter, std=0.3)  # so that scores differ
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(backbone_folders[kind]).save_pretrained(folder)

    return Folders(tmp_path_factory.mktemp("reward") / "reward", make)


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny) -> Path:
    """A folder with what a run needs: train.csv (60 shipped rows), test.csv (12 others), backbone/."""
    folder = tmp_path_factory.mktemp("home")
    with gzip.open(loading.sample_path("train"), "rt", encoding="utf-8", newline="") as file:
        header, *records = csv.reader(file)
    columns = [header.index(name) for name in ("id", "prompt", "response_a", "response_b")]
    tables = {
        "train.csv": [header, *records[:60]],
        "test.csv": [[record[column] for column in columns] for record in (header, *records[60:72])],
    }
    for name, table in tables.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
    shutil.copytree(tiny, folder / "backbone")
    return folder


def run_arguments(home: Path, out: Path, *settings: str) -> list[str]:
    """`prefcls run` on the files of `home`, small: one of three folds, on one baseline; `settings` are KEY=VALUE."""
    small = (f"backbone={home / 'backbone'}", "num_folds=3", "folds=[0]", "start_from=structure_logistic",
             "max_length=32", "num_epochs=1", "batch_size=8")  # fmt: skip
    arguments = ["run", "--train", str(home / "train.csv"), "--test", str(home / "test.csv"), "--out", str(out)]
    return arguments + [part for setting in (*small, *settings) for part in ("--set", setting)]


@pytest.fixture
def prefcls(capsys):
    """prefcls(arguments) -> exit code, what it prints, its message."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return call


def check(done: tuple[int, str, str], code: int, *words: str) -> None:
    """A command has ended with this exit code, and has said these words."""
    assert done[0] == code and "Traceback" not in done[2], done
    assert [word for word in words if word not in done[1] + done[2]] == []


def run_small(home: Path, out: Path, *settings: str) -> dict:
    """Such a run, which must work: its result."""
    assert cli.main(run_arguments(home, out, *settings)) == 0
    return read_json(out / "result.json")


def predict(run: Path, test: Path | str, out: Path) -> np.ndarray:
    """`prefcls predict`, which must work: the probabilities (N, 3) in `out`."""
    assert cli.main(["predict", "--run", str(run), "--test", str(test), "--out", str(out)]) == 0
    return read_probs(out)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, home) -> Path:
    """A finished run of two folds, whose folder held a foreign file before; for tests that only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    out.mkdir()
    (out / "notes.txt").write_text("not of this run", encoding="utf-8")
    run_small(home, out, *TWO_FOLDS)
    return out


@pytest.fixture(scope="session")
def ladder_run(tmp_path_factory, home) -> Path:
    """`prefcls ladder` on the same rows, folds and baseline; for tests that only read it."""
    out = tmp_path_factory.mktemp("ladder") / "ladder"
    assert cli.main(["ladder", *run_arguments(home, out, *TWO_FOLDS)[1:]]) == 0
    return out


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too: its path in the folder -> its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in for Kaggle's server, with credentials of OWNER for it."""
    from kaggle_stand_in import start_stand_in

    stand_in = start_stand_in(monkeypatch, tmp_path)
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """time.sleep does not wait; the seconds it was asked for."""
    slept: list[float] = []

    def nap(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 200, "waits for something that does not come"

    monkeypatch.setattr("time.sleep", nap)
    return slept


@pytest.fixture
def write_csv(tmp_path):
    """write_csv(name, rows, columns=None) -> path of a CSV; cells are given as they stand in the file."""

    def write(name: str, rows: list[dict], columns: tuple[str, ...] | None = None) -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns or list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def make_row(number: int, winner: int | None = None, **cells: object) -> dict:
    """One row as the competition writes it; `winner` adds the three label columns."""
    row = {
        "id": str(1000 + number),
        "prompt": json.dumps([f"question {number}?"]),
        "response_a": json.dumps([f"answer a {number} " + "yes " * (number % 7)]),
        "response_b": json.dumps([f"answer b {number} " + "no " * (number % 5)]),
    }
    if winner is not None:
        row |= {f"winner_{name}": int(winner == i) for i, name in enumerate(("model_a", "model_b", "tie"))}
    return {**row, **cells}


def make_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """As the kind's own: word pieces; bytes, so nothing is unknown and newlines are kept; or Unigram, white space
    collapsed. Those of word pieces have truncation and padding baked in, as ELECTRA's tokenizer.json has them."""
    like_roberta, words, options = kind in ("roberta", "mpnet", "xlm-roberta"), kind in ("bert", "electra", "mpnet"), {}
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if like_roberta else list(BERT_SPECIAL)
    if words:
        special += ["[UNK]"] * like_roberta
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif kind in ("roberta", "modernbert"):
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        tokenizer.normalizer = None if like_roberta else normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        spaces, unicode = (" {2,}", normalizers.NFKC()) if like_roberta else (r"\s{2,}|[\n\r\t]", normalizers.NFC())
        tokenizer.normalizer = normalizers.Sequence([unicode, normalizers.Replace(Regex(spaces), " ")])
        split = [pre_tokenizers.WhitespaceSplit()] if like_roberta else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.Metaspace()])
        tokenizer.decoder, options["unk_token"] = decoders.Metaspace(), special[3 if like_roberta else 1]
        special = special[:4] if like_roberta else special  # XLM-R's <mask> stands after all others
    trained = trainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trained)
    if like_roberta:
        ends = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
        tokenizer.post_processor = processors.RobertaProcessing(*ends, True, False)
        names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
                 "unk_token": "[UNK]" if words else "<unk>", "mask_token": "<mask>"}  # fmt: skip
    else:
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
        )
        names = {f"{token.strip('[]').lower()}_token": token for token in BERT_SPECIAL}
    inputs = ["input_ids", "attention_mask"]
    finished = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)
    if words:
        finished.backend_tokenizer.enable_truncation(12)
        finished.backend_tokenizer.enable_padding(length=12)
    return finished


# Two layers; what a checkpoint of the kind has. RoBERTa's 66 positions hold 64 tokens, as 514 hold 512 in the real one.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = {
    "deberta-v2": {"type_vocab_size": 0, "pad_token_id": 0, "relative_attention": True, "position_buckets": 16,
                   "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
                   "position_biased_input": False},
    "roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "electra": {"embedding_size": 16, "pad_token_id": 0},  # narrower than its layers, so there is a projection
    "bert": {"pad_token_id": 0},
    "modernbert": {"local_attention": 16, "pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3,
                   "sep_token_id": 3},  # a global layer, and one that sees 8 tokens to each side
    "mpnet": {"max_position_embeddings": 66, "pad_token_id": 1},
    "xlm-roberta": {"max_position_embeddings": 66, "type_vocab_size": 1},
}  # fmt: skip


def make_encoder(kind: str, vocab_size: int) -> PreTrainedModel:
    """A tiny encoder with random weights."""
    kind = kind.removeprefix("m") if kind == "mdeberta-v2" else kind
    settings = {"max_position_embeddings": 64, **SIZES, **ENCODERS[kind]}
    pooler = {"add_pooling_layer": False} if kind in ("roberta", "bert", "mpnet", "xlm-roberta") else {}
    return AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=vocab_size, **settings), **pooler)
