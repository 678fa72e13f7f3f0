"""The layout of a reward model's texts: laid out by hand, found by a probe, and kept with the model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_arguments
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.tokenization import LAYOUTS, SideTokenizer, encode_rows
from prefcls_lib.models.probe import probe_layouts
from prefcls_lib.models.saved import load_fold_model, load_scorer
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import read_json

GOOD, BAD = "yes", "no"


def make_rows(count: int) -> pd.DataFrame:
    """Rows in which the answer that says yes has won; every fifth is a tie, which says nothing about the layout."""
    random, rows = np.random.default_rng(0), []
    for number in range(count):
        a, b = (GOOD, BAD) if random.random() < 0.5 else (BAD, GOOD)
        words = " ".join(random.choice(["one", "two", "the", "and"], 3))
        label = 2 if number % 5 == 0 else int(a == BAD)
        rows.append({"id": str(number), "prompt": [f"{words}?"], "response_a": [a], "response_b": [b], "label": label,
                     "group": str(number)})  # fmt: skip
    return pd.DataFrame(rows)


def train_reward_model(tiny: Path, folder: Path, layout: str) -> Path:
    """Prefers yes in texts of this layout, and no in all others: as wrong there as a model can be."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # larger than usual: learns in a few steps
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows, plain = make_rows(40), SideTokenizer(tokenizer)
    sides = {name: encode_rows(rows, plain.with_layout(name), 48, "none") for name in LAYOUTS}
    won = torch.tensor([1.0 if a == [GOOD] else -1.0 for a in rows["response_a"]])

    def margins(name: str) -> torch.Tensor:
        ids = sides[name].token_ids
        padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(i.astype(np.int64)) for i in ids], batch_first=True)
        ends = (padded == tokenizer.sep_token_id).long()
        scores = model(padded, attention_mask=(padded != 0).long(), token_type_ids=(ends.cumsum(1) - ends) % 2).logits
        both = scores[:, 0][torch.as_tensor(sides[name].sides)]
        return both[:, 0] - both[:, 1]

    for _ in range(60):
        signs = {name: 1.0 if name == layout else -1.0 for name in LAYOUTS}
        loss = sum(torch.nn.functional.softplus(-sign * won * margins(name)).mean() for name, sign in signs.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05:
            break
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> dict[str, Path]:
    """layout -> a reward model that was trained on it."""
    root = tmp_path_factory.mktemp("trained")
    return {layout: train_reward_model(tiny, root / layout, layout) for layout in ("pair", "markers")}


def test_layouts_by_hand(tiny):
    """Two turns: what stands before, between and after; within any budget the special tokens stay, and all is kept."""
    tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(tiny))
    a, b, c, d = tokenizer.encode_texts(["one", "two", "the", "and"])
    shown = {
        "pair": "[CLS] one [SEP] two [SEP] the [SEP] and [SEP]",
        "plain": "[CLS] one two the and [SEP]",
        "markers": "[CLS] question : one answer : two question : the answer : and [SEP]",
    }
    for layout, expected in shown.items():
        changed = tokenizer.with_layout(layout)
        ids, seen = changed.lay_out([(a, b), (c, d)], 64)
        assert (changed.decode(ids), seen, changed.layout) == (expected, len(b) + len(d), layout)
        for budget in range(16, len(ids)):
            assert len(changed.lay_out([(a, b), (c, d)], budget)[0]) <= budget
    assert tokenizer.layout == "pair"


def test_what_is_cut_is_counted_with_the_layout(tiny, sample_rows):
    """A side is cut where its whole length, joints included, is beyond the limit."""
    tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(tiny)).with_layout("markers")
    rows = sample_rows[sample_rows["prompt"].map(len) > 1].head(3)
    whole = encode_rows(rows, tokenizer, 10**6, "none")
    for length in whole.lengths:
        for limit in (length - 1, length):
            cut = encode_rows(rows, tokenizer, limit, "none").cut
            np.testing.assert_array_equal(cut, whole.lengths[whole.sides] > limit)


@pytest.mark.parametrize("layout", ["pair", "markers"])
def test_probe_finds_the_layout_of_training(layout, trained, capsys):
    """By far: all pairs right in this one, none in the others; ties are not asked."""
    scorer = load_scorer(RunConfig(init_from=str(trained[layout]), max_length=48, mixed_precision="no"))
    found = probe_layouts(scorer, make_rows(100))
    assert (found["layout"], found["rows"]) == (layout, 80)
    assert found["accuracy"][layout] > 0.95 > 0.05 > max(v for k, v in found["accuracy"].items() if k != layout)
    assert f"{layout} {found['accuracy'][layout]:.3f}" in capsys.readouterr().out


def test_no_layout_above_chance(trained, capsys):
    """The votes follow nothing: says so, and takes the layout of special tokens."""
    rows = make_rows(100)
    rows["label"] = np.arange(100) % 2
    rows["response_b"] = rows["response_a"]
    scorer = load_scorer(RunConfig(init_from=str(trained["markers"]), max_length=48, mixed_precision="no"))
    found = probe_layouts(scorer, rows)
    assert found["layout"] == "pair" and set(found["accuracy"].values()) == {0.5}
    assert "no layout is above chance" in capsys.readouterr().out


def test_run_and_ladder_use_and_keep_it(trained, tiny, tmp_path, capsys):
    """Both find it on rows; the saved model has it, so that `predict` needs no probe; a run with pair says nothing."""
    rows = make_rows(60)
    loading.write_rows(tmp_path / "train.csv", rows)
    loading.write_rows(tmp_path / "test.csv", rows.drop(columns="label").head(8))
    (tmp_path / "backbone").symlink_to(tiny)
    for layout in trained:
        out = tmp_path / layout
        settings = (f"init_from={trained[layout]}", "folds=[0]", "max_length=48", "mixed_precision=no")
        assert cli.main(run_arguments(tmp_path, out, *settings)) == 0
        assert f"{layout} 1.000" in capsys.readouterr().out
        saved = read_json(out / "model" / "fold0" / "preference.json")
        assert saved.get("layout") == (None if layout == "pair" else layout)
        assert load_fold_model(out / "model" / "fold0").backbone.tokenizer.layout == layout
        again = tmp_path / f"{layout}.csv"
        assert cli.main(["predict", "--run", str(out), "--test", str(tmp_path / "test.csv"), "--out", str(again)]) == 0
        first, second = (read_table(path)[list(LABEL_COLUMNS)].to_numpy() for path in (out / "submission.csv", again))
        np.testing.assert_array_equal(first, second)
    arguments = run_arguments(tmp_path, tmp_path / "ladder", *settings)
    assert cli.main(["ladder", *arguments[1:]]) == 0
    assert read_json(tmp_path / "ladder" / "model" / "reward" / "preference.json")["layout"] == "markers"
