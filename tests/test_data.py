"""CSV to rows, what is done with odd cells, and the one fold plan."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from conftest import make_row
from test_cases import put, zipped

from prefcls_lib.data import loading, splits
from prefcls_lib.data.schema import LABEL_COLUMNS, TEXT_COLUMNS
from prefcls_lib.runtime.files import UserError


def read_one(write_csv, **cells) -> pd.Series:
    """One training row with these raw cells, read back."""
    return loading.read_rows(write_csv("train.csv", [make_row(0, 0, **cells)]), labelled=True).iloc[0]


def labelled_rows(num_rows: int, rows_per_prompt: int = 1, seed: int = 0) -> pd.DataFrame:
    """Rows with what a fold plan needs: id, label in three nearly equal shares, group."""
    labels = np.random.default_rng(seed).integers(0, 3, num_rows)
    groups = [loading.prompt_group(f"prompt {number // rows_per_prompt}") for number in range(num_rows)]
    return pd.DataFrame({"id": [f"r{number}" for number in range(num_rows)], "label": labels, "group": groups})


# raw cell, its turns
CELLS = [
    ('["one"]', ["one"]), (' [ "one" , "two" ] ', ["one", "two"]),
    (r'["a\/b"]', ["a/b"]),
    (r'["line\nbreak\ttab \"quoted\" back\\slash"]', ['line\nbreak\ttab "quoted" back\\slash']),
    (r'["Caf\u00e9 \ud83d\ude00"]', ["Caf\u00e9 \U0001f600"]),
    (r'["half \ud83d of a pair"]', ["half \ufffd of a pair"]),
    (r'["\ude00\ud83d"]', ["\ufffd\ufffd"]),
    ('["Caf\u00e9, na\u00efve"]', ["Caf\u00e9, na\u00efve"]),
    ("[null]", [""]), ('["one", null, ""]', ["one", "", ""]),
    ('["null", "[]"]', ["null", "[]"]), ('["one",\n"two"]', ["one", "two"]),
    (json.dumps(["word " * 60_000]), ["word " * 60_000]),  # a long one, as real answers are
]  # fmt: skip


@pytest.mark.parametrize(("cell", "turns"), CELLS, ids=range(len(CELLS)))
def test_cell_becomes_its_turns(write_csv, cell, turns):
    """Escapes are resolved, null is the empty text, half a surrogate pair is U+FFFD."""
    same = dict.fromkeys(TEXT_COLUMNS, cell)
    row = read_one(write_csv, **same)
    assert [row[name] for name in TEXT_COLUMNS] == [turns] * 3


def test_missing_turns_are_filled_with_empty_texts(write_csv):
    """Three prompts, one answer A, no answer B: each cell has three turns; three empty cells have one."""
    row = read_one(write_csv, prompt='["p1", "p2", "p3"]', response_a='["a1"]', response_b="[]")
    assert [row[name] for name in TEXT_COLUMNS] == [["p1", "p2", "p3"], ["a1", "", ""], ["", "", ""]]
    row = read_one(write_csv, **dict.fromkeys(TEXT_COLUMNS, "[]"))
    assert [row[name] for name in TEXT_COLUMNS] == [[""]] * 3


def test_labels_are_in_column_order(write_csv):
    """winner_model_a is 0, winner_model_b is 1, winner_tie is 2; 1.0 is as good as 1."""
    assert LABEL_COLUMNS == ("winner_model_a", "winner_model_b", "winner_tie")
    table = [make_row(number, winner) for number, winner in enumerate((2, 0, 1))]
    table.append(make_row(3, 0, winner_model_a="0.0", winner_model_b=" 1.0 ", winner_tie="0"))
    rows = loading.read_rows(write_csv("train.csv", table), labelled=True)
    assert rows["label"].tolist() == [2, 0, 1, 1]


def test_columns_may_stand_in_any_order_and_others_are_ignored(write_csv):
    """Columns are found by name; model names come along where they are."""
    table = [{"extra": "x", **dict(reversed(make_row(0, 1).items())), "model_b": "m2", "model_a": "m1"}]
    rows = loading.read_rows(write_csv("train.csv", table), labelled=True)
    assert rows[["model_a", "model_b", "label"]].values.tolist() == [["m1", "m2", 1]]
    assert "extra" not in rows


def test_wrapping_byte_order_mark_and_line_ends_change_nothing(tmp_path, write_csv):
    """The same rows from plain UTF-8, with a byte order mark, in gzip or zip by whatever name, other line ends."""
    plain = write_csv("train.csv", [make_row(number, number % 3) for number in range(5)])
    content = plain.read_bytes()
    expected = loading.read_rows(plain, labelled=True)
    variants = {
        "bom.csv": b"\xef\xbb\xbf" + content,
        "zipped.csv.gz": gzip.compress(content),
        "bom.csv.gz": gzip.compress(b"\xef\xbb\xbf" + content),
        "zipped.csv": gzip.compress(content),
        "plain.csv.gz": content,
        "train.zip": zipped(**{"folder/train.csv": content}),
        "unix.csv": content.replace(b"\r\n", b"\n"),
        "blank.csv": content + b"\r\n\r\n",
    }
    for name, variant in variants.items():
        pd.testing.assert_frame_equal(loading.read_rows(put(tmp_path / name, variant), labelled=True), expected)


@pytest.mark.parametrize("place", [0, 4095, 4096, 9999])
def test_surplus_cell_is_refused_in_any_row(tmp_path, place):
    """Also where pandas begins a new piece of the file, whose rows would shift by one column."""
    rows = ["1,2,3"] * 10_000
    rows[place] = "1,2,3,4"
    path = put(tmp_path / "rows.csv", "\n".join(["a,b,c", *rows]).encode())
    with pytest.raises(UserError, match=f"Expected 3 fields in line {place + 2}, saw 4"):
        loading.read_csv(path)


def test_prompt_group_is_the_normalised_first_turn():
    """White space and case do not make another prompt; words do."""
    assert loading.prompt_group("  What is\n\n2+2? ") == loading.prompt_group("what IS 2+2?")
    assert loading.prompt_group("what is 2+2?") != loading.prompt_group("what is 2+3?")


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows():
    """With another seed a tenth keep theirs. No prompt is in two; each fold has a tenth of 50, 100 and 50 rows."""
    rows = labelled_rows(200, 2)
    even = rows.assign(label=np.repeat([0, 1, 1, 2], 50))
    assert pd.crosstab(splits.assign_folds(even, 10, 42), even["label"]).sub([5, 10, 5]).abs().to_numpy().max() <= 1
    folds = pd.Series(splits.assign_folds(rows, 10, seed=42), index=rows["id"])
    assert set(folds) == set(range(10)) and folds.groupby(rows["group"].to_numpy()).nunique().max() == 1
    assert np.mean(splits.assign_folds(rows, 10, seed=43) == folds) < 0.5
    for order in (np.arange(200)[::-1], np.random.default_rng(0).permutation(200)):
        shuffled = rows.iloc[order].reset_index(drop=True)
        again = pd.Series(splits.assign_folds(shuffled, 10, seed=42), index=shuffled["id"])
        assert again.loc[folds.index].tolist() == folds.tolist()


def test_folds_that_cannot_be_are_refused():
    """A class without rows, fewer rows of a class than folds, fewer prompts than folds, ties or a fold of one."""
    rows = labelled_rows(60)
    for table, num_folds, words in (
        (rows.assign(label=rows["label"] % 2), 5, "60 rows, those with winner_tie=1 have 0 different prompts"),
        (rows, 50, r"too few rows for num_folds=50: .* have \d+ different prompts; more than 50"),
        (labelled_rows(60, 20), 5, "have 3 different prompts"),
        (rows.assign(group=rows["group"].where(rows["label"] < 2, "one")), 5, "winner_tie=1 have 1 different prompts"),
        (rows.assign(group=rows["group"].where(rows.index < 40, "one")), 5, "0 has only one prompt, that of 20 of 60"),
    ):
        with pytest.raises(UserError, match=words):
            splits.assign_folds(table, num_folds, 42)


def test_rows_are_taken_by_content():
    """The same ids whatever the order of the file, and in its order; ten of them are among thirty."""
    rows = labelled_rows(100)
    taken = splits.take_rows(rows, 30, seed=42)
    assert len(taken) == 30 and taken.index.tolist() == list(range(30))
    assert taken["id"].tolist() == [i for i in rows["id"] if i in set(taken["id"])]
    backwards = splits.take_rows(rows[::-1].reset_index(drop=True), 30, seed=42)
    assert backwards["id"].tolist() == taken["id"].tolist()[::-1]
    assert set(splits.take_rows(rows, 10, seed=42)["id"]) < set(taken["id"])
    assert set(splits.take_rows(rows, 30, seed=43)["id"]) != set(taken["id"])
    for no_limit in (0, 100, 101):
        pd.testing.assert_frame_equal(splits.take_rows(rows, no_limit, seed=42), rows)


def test_shipped_sample():
    """770 training rows of all three classes, and the competition's three test rows in their order."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    assert len(rows) == rows["id"].nunique() == 770 and (np.bincount(rows["label"]) > 200).all()
    assert {"model_a", "model_b"} < set(rows)
    assert (np.bincount(splits.assign_folds(rows, 10, seed=42)) > 50).all()
    test = loading.read_rows(loading.sample_path("test"), labelled=False)
    assert test["id"].tolist() == ["136060", "211333", "1233961"]
    assert "label" not in test


def test_description_of_rows_by_hand(write_csv):
    """Two rows: one of two turns with a null answer, one with identical answers."""
    table = [
        make_row(0, 0, prompt='["p", "q"]', response_a='["abc", null]', response_b='["d", "e"]'),
        make_row(1, 2, response_a='["same"]', response_b='["same"]'),
    ]
    facts = loading.describe_rows(loading.read_rows(write_csv("train.csv", table), labelled=True))["value"]
    assert facts["rows"] == facts["different prompts"] == facts["most turns"] == 2
    assert facts["multi-turn rows"] == facts["A wins / B wins / tie"].split(" / ")[0] == "50.0%"
    assert facts["rows with an empty or null answer"] == facts["identical answers"] == "50.00%"
    assert facts["median characters of an answer"] == 4  # "abc\n", "d\ne", "same", "same"
