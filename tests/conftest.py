"""Tiny pretrained encoders with real tokenizers of all kinds, made in process: no network."""

import csv
import gzip
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: on a busy machine threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.doctor import checks
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import read_json

KINDS = ("deberta-v2", "roberta", "electra", "bert")
MORE_KINDS = ("modernbert", "mpnet", "xlm-roberta", "mdeberta-v2")
VOCABULARY = 600
TWO_FOLDS = ("folds=[0,1]",)  # of `finished_run`


@pytest.fixture(scope="session")
def sample_rows():
    """The first 120 shipped training rows."""
    return loading.read_rows(loading.sample_path("train"), labelled=True).head(120)


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory, sample_rows) -> dict[str, Path]:
    """kind -> folder with config.json, model.safetensors and tokenizer, as a hub checkpoint has them.

    The tokenizers of xlm-roberta and mdeberta-v2 saw many scripts.
    """
    makers = {
        "deberta-v2": (make_unigram, make_deberta),
        "roberta": (make_byte_bpe, make_roberta),
        "electra": (make_wordpiece, make_electra),
        "bert": (make_wordpiece, make_bert),
        "modernbert": (make_modern_bpe, make_modernbert),
        "mpnet": (make_mpnet_wordpiece, make_mpnet),
        "xlm-roberta": (make_xlmr_unigram, make_xlmr),
        "mdeberta-v2": (make_unigram, make_deberta),
    }
    texts = [turn[:1000] for name in ("prompt", "response_a") for turns in sample_rows[name] for turn in turns]
    texts += ["one ¶ two ¶ three … ... ¶ one ¶"] * 200
    many = texts[:100] + [text for text in checks.SCRIPTS.values() for _ in range(20)]
    root, folders = tmp_path_factory.mktemp("backbones"), {}
    for kind, (make_tokenizer, make_encoder) in makers.items():
        torch.manual_seed(0)
        folders[kind] = root / f"tiny-{kind}"
        tokenizer = make_tokenizer(many if kind in ("xlm-roberta", "mdeberta-v2") else texts)
        tokenizer.save_pretrained(folders[kind])
        make_encoder(len(tokenizer)).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def tiny(backbone_folders) -> Path:
    """The quickest of them, where the kind does not matter."""
    return backbone_folders["bert"]


@pytest.fixture(scope="session")
def reward_folders(backbone_folders, tmp_path_factory) -> dict[str, Path]:
    """kind -> folder of a reward model: a sequence-classification checkpoint with one output, and its tokenizer."""
    root, folders = tmp_path_factory.mktemp("reward"), {}
    for kind in KINDS:
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(backbone_folders[kind], num_labels=1)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                torch.nn.init.normal_(parameter, std=0.3)  # so that scores differ
        folders[kind] = root / f"reward-{kind}"
        model.save_pretrained(folders[kind])
        AutoTokenizer.from_pretrained(backbone_folders[kind]).save_pretrained(folders[kind])
    return folders


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


def run_small(home: Path, out: Path, *settings: str) -> dict:
    """Such a run, which must work: its result."""
    assert cli.main(run_arguments(home, out, *settings)) == 0
    return read_json(out / "result.json")


def predict(run: Path, test: Path | str, out: Path) -> np.ndarray:
    """`prefcls predict`, which must work: the probabilities (N, 3) in `out`."""
    assert cli.main(["predict", "--run", str(run), "--test", str(test), "--out", str(out)]) == 0
    return read_probs(out)


def read_probs(path: Path) -> np.ndarray:
    """(N, 3) of a table with probabilities."""
    return read_table(path)[list(LABEL_COLUMNS)].to_numpy()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, home) -> Path:
    """A finished run of two folds, whose folder held a foreign file before; for tests that only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    out.mkdir()
    (out / "notes.txt").write_text("not of this run", encoding="utf-8")
    run_small(home, out, *TWO_FOLDS)
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


def make_unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    """As DeBERTa-v3's: white space collapsed, Metaspace, Unigram; [CLS] [SEP] are of the vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish_tokenizer(tokenizer)


def make_wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """As BERT's and ELECTRA's, with truncation and padding baked in as ELECTRA's tokenizer.json has them."""
    return _bake_length(_finish_tokenizer(_train_wordpiece(texts, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])))


def make_mpnet_wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """As MPNet's: BERT's pieces and its [UNK], RoBERTa's special tokens, truncation and padding baked in."""
    tokenizer = _train_wordpiece(texts, ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"])
    return _bake_length(_finish_like_roberta(tokenizer, unknown="[UNK]"))


def _train_wordpiece(texts: list[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _bake_length(finished: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    finished.backend_tokenizer.enable_truncation(12)
    finished.backend_tokenizer.enable_padding(length=12)
    return finished


def _finish_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]",
    )  # fmt: skip


def make_byte_bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """As RoBERTa's: bytes, so nothing is unknown and newlines are kept."""
    tokenizer = _train_byte_bpe(texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return _finish_like_roberta(tokenizer)


def make_modern_bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """As ModernBERT's: bytes, with BERT's special tokens."""
    tokenizer = _train_byte_bpe(texts, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.NFC()
    return _finish_tokenizer(tokenizer)


def make_xlmr_unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    """As XLM-R's: white space collapsed, Metaspace, Unigram, RoBERTa's special tokens, <mask> after all others."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish_like_roberta(tokenizer)


def _train_byte_bpe(texts: list[str], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _finish_like_roberta(tokenizer: Tokenizer, unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>")), True, False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token=unknown, mask_token="<mask>",
    )  # fmt: skip


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def make_deberta(vocab_size: int) -> DebertaV2Model:
    """Two layers with DeBERTa-v3's kind of relative attention."""
    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=vocab_size, **SIZES, max_position_embeddings=64, type_vocab_size=0, pad_token_id=0,
            relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_biased_input=False,
        )
    )  # fmt: skip


def make_roberta(vocab_size: int) -> RobertaModel:
    """66 positions, so 64 tokens, as 514 hold 512 in the real one."""
    return RobertaModel(
        RobertaConfig(vocab_size=vocab_size, **SIZES, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1),
        add_pooling_layer=False,
    )


def make_electra(vocab_size: int) -> ElectraModel:
    """With the projection that ELECTRA has where its embeddings are narrower than its layers."""
    return ElectraModel(
        ElectraConfig(vocab_size=vocab_size, embedding_size=16, **SIZES, max_position_embeddings=64, pad_token_id=0)
    )


def make_bert(vocab_size: int) -> BertModel:
    """As the demo's MiniLM, smaller."""
    config = BertConfig(vocab_size=vocab_size, **SIZES, max_position_embeddings=64, pad_token_id=0)
    return BertModel(config, add_pooling_layer=False)


def make_xlmr(vocab_size: int) -> XLMRobertaModel:
    """66 positions hold 64 tokens, as RoBERTa's."""
    config = XLMRobertaConfig(vocab_size=vocab_size, **SIZES, max_position_embeddings=66, type_vocab_size=1)
    return XLMRobertaModel(config, add_pooling_layer=False)


def make_mpnet(vocab_size: int) -> MPNetModel:
    """66 positions hold 64 tokens, as RoBERTa's; a relative bias in every layer beside them."""
    config = MPNetConfig(vocab_size=vocab_size, **SIZES, max_position_embeddings=66, pad_token_id=1)
    return MPNetModel(config, add_pooling_layer=False)


def make_modernbert(vocab_size: int) -> ModernBertModel:
    """One global layer, one that sees 8 tokens to each side."""
    return ModernBertModel(
        ModernBertConfig(
            vocab_size=vocab_size, **SIZES, max_position_embeddings=64, local_attention=16,
            pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
        )
    )  # fmt: skip
