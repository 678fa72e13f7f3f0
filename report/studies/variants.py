"""The variants of the benchmark: each a way to train or to predict, on the same pairs. See benchmark.py."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FeatureScaler, compute_features
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.backbones import load_backbone, load_encoder
from prefcls_lib.models.network import PreferenceHead, PreferenceModel, pool
from prefcls_lib.models.predict import PREDICT_TOKENS, predict_proba
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import read_json
from prefcls_lib.training.loop import fit

CONFIGS = Path(__file__).parents[1] / "backbones"  # config.json of each backbone
LIMIT_TOKENS, LIMIT_LENGTH = 4096, 256  # the padded batch of the limit; "limit-long" has sides of max_length
PAIRS = {
    "original": 8,
    "trainer": 32,
    "st": 32,
    "ours": 128,
}  # pairs a repeat; padded variants need few


def read_config(path: Path) -> PretrainedConfig:
    """A backbone's configuration from report/backbones/."""
    return AutoConfig.for_model(**read_json(path)["config"])


class Bench:
    """One model at one length and precision: what every variant needs, made once.

    Args:
        model_name: minilm, or a name in report/backbones/.
        max_length: tokens of a side.
        precision: "no", "bf16" or "fp16".
    """

    def __init__(self, model_name: str, max_length: int, precision: str, rows_path: str):
        self.model_name, self.max_length, self.precision = model_name, max_length, precision
        self.device = self.accelerator.device
        backbone = load_backbone("minilm", max_length)
        rows = loading.read_rows(loading.locate_csv(rows_path, "train"), labelled=True)
        encoded = encode_rows(rows, backbone.tokenizer, max_length, "none")
        features = compute_features(rows)
        features = FeatureScaler.fit(features).transform(features).astype(np.float32)
        self.everything = Examples(encoded.token_ids, encoded.sides, features, rows["label"].to_numpy())
        order = np.random.default_rng(0).permutation(len(rows))
        self.train = self.everything.take(order[: PAIRS["ours"]])
        self.valid = self.everything.take(order[PAIRS["ours"] :][:8])
        self.rows = rows.iloc[order].reset_index(drop=True)
        self.backbone, self.pad_id = backbone, backbone.tokenizer.pad_id
        described = backbone.config if model_name == "minilm" else self._config()
        self.config = RunConfig(
            max_length=max_length,
            mixed_precision=precision,
            num_epochs=1,
            validations_per_epoch=1,
            start_from="none",
        ).with_recipe(choose_recipe(described))

    @property
    def accelerator(self) -> Accelerator:
        """A new one: Trainer resets accelerate's state."""
        return make_accelerator(self.precision)

    def _config(self):
        return read_config(CONFIGS / f"{self.model_name}.json")

    def encoder(self, dropout: float) -> nn.Module:
        """A new encoder in train mode."""
        if self.model_name == "minilm":
            encoder = load_encoder(self.backbone.path, dropout)
        else:
            config = self._config()
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
            encoder = AutoModel.from_config(config).train()
        return encoder.to(self.device)

    def model(self, dropout: float) -> PreferenceModel:
        """A new PreferenceModel on the device."""
        encoder = self.encoder(dropout)
        head = PreferenceHead(encoder.config.hidden_size, True, True, dropout)
        return PreferenceModel(encoder, head, "mean").to(self.device)

    def padded(self, rows: np.ndarray, side: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask (B, length) of one side of some rows."""
        ids = torch.full((len(rows), length), self.pad_id)
        for line, place in zip(ids, self.train.sides[rows, side], strict=True):
            tokens = torch.as_tensor(self.train.token_ids[place].astype(np.int64))
            line[: len(tokens)] = tokens
        lengths = torch.as_tensor(self.train.lengths[rows, side])
        mask = (torch.arange(length)[None] < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def tokens(self, pairs: int) -> int:
        """Real tokens of the first pairs."""
        return int(self.train.lengths[:pairs].sum())


def measure_peak(bench: Bench, size: int = 4096, repeats: int = 8) -> float:
    """Operations a second of this device in the largest matrix products it is good at, in the bench's precision."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[bench.precision]
    size = size if bench.device.type == "cuda" else size // 2
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    a @ b
    return max(2 * size**3 / timed(bench.device, lambda: a @ b) for _ in range(repeats))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def train_original(bench: Bench) -> tuple[int, int, float]:
    """Steps of the study's loop -> pairs, real tokens, seconds."""
    model, pairs = bench.model(dropout=0.1), PAIRS["original"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> None:
        rows = np.arange(pairs)
        u, v = (_embed(model, *bench.padded(rows, side, bench.max_length)) for side in (0, 1))
        logits = model.head(u, v, torch.as_tensor(bench.train.features[rows], device=u.device))
        labels = torch.as_tensor(bench.train.labels[rows], device=u.device)
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()

    return pairs, bench.tokens(pairs), timed(bench.device, step)


def train_trainer(bench: Bench) -> tuple[int, int, float]:
    """One step of Hugging Face Trainer: 16 pairs a batch, two batches a step -> pairs, real tokens, seconds."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    pairs, clock = PAIRS["trainer"], {}

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return pairs

        def __getitem__(self, row: int) -> int:
            return row

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bench.model(bench.config.dropout)

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = rows.cpu().numpy()
            length = int(bench.train.lengths[rows].max())
            sides = [bench.padded(rows, side, length) for side in (0, 1)]
            both = _embed(self.inner, *(torch.cat(parts) for parts in zip(*sides, strict=True)))
            u, v = both.split(len(rows))
            logits = self.inner.head(u, v, torch.as_tensor(bench.train.features[rows], device=u.device))
            return {"loss": nn.functional.cross_entropy(logits, torch.as_tensor(bench.train.labels[rows]).to(u.device))}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock["begin"] = time.perf_counter()

        def on_train_end(self, *_, **__):
            clock["end"] = time.perf_counter()

    model = Wrapped()
    with tempfile.TemporaryDirectory() as folder:
        precision = bench.precision
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=bench.device.type == "cpu",
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        collate = lambda rows: {"rows": torch.tensor(rows)}  # noqa: E731
        Trainer(model, arguments, train_dataset=Pairs(), data_collator=collate, callbacks=[Clock()]).train()
    return pairs, bench.tokens(pairs), clock["end"] - clock["begin"]


def train_st(bench: Bench) -> tuple[int, int, float]:
    """sentence-transformers' trainer with SoftmaxLoss, its defaults -> pairs, real tokens, seconds."""
    import pyarrow
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import SoftmaxLoss

    pairs = PAIRS["st"]
    model = SentenceTransformer(str(bench.backbone.path), device=str(bench.device))
    model.max_seq_length = bench.max_length
    texts = _side_texts(bench, pairs)
    table = pyarrow.table({"a": texts[0], "b": texts[1], "label": bench.train.labels[:pairs]})
    dataset = Dataset(table, fingerprint="benchmark")  # else it would be made by pickling
    loss = SoftmaxLoss(model, model.get_sentence_embedding_dimension(), num_labels=3)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, num_train_epochs=1, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss)
        return pairs, bench.tokens(pairs), timed(bench.device, trainer.train)


def train_ours(bench: Bench) -> tuple[int, int, float]:
    """`fit` -> pairs, real tokens, seconds in training steps."""
    result = fit(
        bench.model(bench.config.dropout), bench.train, bench.valid, bench.config, bench.accelerator, bench.pad_id
    )
    return len(bench.train), result.tokens.real, result.step_seconds


def train_limit(bench: Bench, long: bool = False) -> tuple[int, int, float]:
    """Forward and backward of the bare encoder on full padded batches -> 0, tokens, seconds."""
    encoder = bench.encoder(dropout=0.0)
    length = bench.max_length if long else LIMIT_LENGTH
    ids = torch.randint(1000, 20_000, (LIMIT_TOKENS // length, length), device=bench.device)
    mask = torch.ones_like(ids)

    autocast = bench.accelerator.autocast

    def step() -> None:
        for _ in range(4):
            with autocast():
                hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            hidden.float().mean().backward()

    return 0, 4 * ids.numel(), timed(bench.device, step)


def predict_original(bench: Bench) -> tuple[int, int, float]:
    """The study's prediction: one row after the other's batch, padded, fp32."""
    model, pairs = bench.model(dropout=0.0).eval(), PAIRS["original"]

    def work() -> None:
        with torch.inference_mode():
            rows = np.arange(pairs)
            u, v = (_embed(model, *bench.padded(rows, side, bench.max_length)) for side in (0, 1))
            model.head(u, v, torch.as_tensor(bench.train.features[rows], device=u.device))

    return pairs, bench.tokens(pairs), timed(bench.device, work)


def predict_st(bench: Bench) -> tuple[int, int, float]:
    """sentence-transformers' `encode` of the same texts, its defaults."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bench.backbone.path), device=str(bench.device))
    model.max_seq_length = bench.max_length
    texts = _side_texts(bench, len(bench.train))
    work = lambda: model.encode(texts[0] + texts[1], show_progress_bar=False)  # noqa: E731
    return len(bench.train), bench.tokens(len(bench.train)), timed(bench.device, work)


def predict_ours(bench: Bench) -> tuple[int, int, float]:
    """`predict_proba`: each different side once, both orders of A and B."""
    model = bench.model(dropout=0.0)
    accelerator = bench.accelerator
    work = lambda: predict_proba(model, bench.train, accelerator, bench.pad_id)  # noqa: E731
    return len(bench.train), bench.tokens(len(bench.train)), timed(bench.device, work)


def predict_limit(bench: Bench, long: bool = False) -> tuple[int, int, float]:
    """The bare encoder on full padded batches."""
    encoder = bench.encoder(dropout=0.0).eval()
    length = bench.max_length if long else LIMIT_LENGTH
    ids = torch.randint(1000, 20_000, (PREDICT_TOKENS // length, length), device=bench.device)

    autocast = bench.accelerator.autocast

    def work() -> None:
        with torch.inference_mode(), autocast():
            for _ in range(4):
                encoder(input_ids=ids, attention_mask=torch.ones_like(ids))

    return 0, 4 * ids.numel(), timed(bench.device, work)


TRAIN = {"original": train_original, "trainer": train_trainer, "st": train_st, "ours": train_ours, "limit": train_limit}
TRAIN["limit-long"] = partial(train_limit, long=True)
PREDICT = {"original": predict_original, "st": predict_st, "ours": predict_ours, "limit": predict_limit}
PREDICT["limit-long"] = partial(predict_limit, long=True)


def _embed(model: PreferenceModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    hidden = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return pool(hidden, attention_mask, "mean")


def _side_texts(bench: Bench, pairs: int) -> list[list[str]]:
    """Prompt and answer as text, for both sides of the first pairs."""
    rows = bench.rows.head(pairs)
    return [["\n".join([*p, *r]) for p, r in zip(rows["prompt"], rows[name], strict=True)]
            for name in ("response_a", "response_b")]  # fmt: skip
