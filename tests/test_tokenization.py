"""Layout, budget and special tokens, for all four tokenizers."""

import re
import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import KINDS
from tokenizers import processors
from transformers import AutoTokenizer

from prefcls_lib.data.tokenization import SideTokenizer, clean_text, encode_rows, mark_newlines
from prefcls_lib.runtime.files import UserError


@pytest.fixture(params=KINDS)
def tokenizer(request, backbone_folders) -> SideTokenizer:
    return SideTokenizer(AutoTokenizer.from_pretrained(backbone_folders[request.param]))


@pytest.fixture
def bert(backbone_folders) -> SideTokenizer:
    """BERT's, with token 7 where something was cut."""
    tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(backbone_folders["bert"]))
    tokenizer.cut_marker = np.array([7], dtype=np.int32)
    return tokenizer


def ids(count: int, start: int = 100) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def rows_of(prompt: list[str], a: list[str], b: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"id": ["1"], "prompt": [prompt], "response_a": [a], "response_b": [b]})


def parts_of(tokenizer: SideTokenizer, laid: np.ndarray) -> list[list[int]]:
    """The texts of a side whose separator is one token; the ids of its ends are checked."""
    assert (laid[0], laid[-1]) == (tokenizer.prefix[0], tokenizer.suffix[0])
    places = [0, *np.flatnonzero(laid == tokenizer.between[0])]
    return [laid[start + 1 : end].tolist() for start, end in pairwise(places)]


def test_short_side_is_laid_out_whole(tokenizer):
    """[CLS] p1 [SEP] a1 [SEP] p2 [SEP] a2 [SEP], with the backbone's own separator between texts."""
    laid = tokenizer.lay_out([(ids(2), ids(3, 200)), (ids(1, 300), ids(2, 400))], 64)
    between = tokenizer.between.tolist()
    cls_id, sep_id = tokenizer.prefix.tolist(), tokenizer.suffix.tolist()
    expected = [*cls_id, 100, 101, *between, 200, 201, 202, *between, 300, *between, 400, 401, *sep_id]
    assert laid.tolist() == expected


HEAD_AND_TAIL = [100, 101, 102, 7, 148, 149]  # of a prompt of 50 tokens in 6: 3 head + marker + 2 tail
# turns as lengths (prompt, answer, ...), most tokens; the parts, or their lengths. Texts begin with 100, 200, 300 ...
BUDGETS = [
    # [CLS] P [SEP] A [SEP] in 29 tokens: 26 for texts; the prompt may take 6 of them, the answer gets 20
    ([(50, 50)], 29, [HEAD_AND_TAIL, [*range(200, 210), 7, *range(241, 250)]]),
    ([(50, 4)], 29, [22, 4]),  # a short answer leaves its budget to the prompt
    # [CLS] P [SEP] A [SEP] B [SEP] in 30 tokens: 26 for texts, 6 of them for the prompt, 10 for each answer
    ([(50, 50, 50)], 30, [HEAD_AND_TAIL, *([*range(n, n + 5), 7, *range(n + 46, n + 50)] for n in (200, 300))]),
    ([(50, 50, 4)], 30, [HEAD_AND_TAIL, [*range(200, 208), 7, *range(243, 250)], [300, 301, 302, 303]]),
    ([(50, 4, 50)], 30, [6, 4, 16]),
    ([(50, 50, 50)], 31, [6, 10, 11]),
    ([(50, 3, 4)], 30, [19, 3, 4]),
    ([(3, 90), (2, 2)], 40, [3, 28, 2, 2]),  # a short last turn leaves its budget to the turn before it
    ([(9, 90), (5, 90)], 32, [5, 24]),  # a last turn that fills the budget leaves nothing
]


@pytest.mark.parametrize(("turns", "max_length", "expected"), BUDGETS)
def test_budget_by_hand(bert, turns, max_length, expected):
    """A text that must be cut keeps its head and its tail; what one text does not need goes to others."""
    starts = iter(range(100, 1000, 100))
    laid = bert.lay_out([tuple(ids(count, next(starts)) for count in turn) for turn in turns], max_length)
    parts = parts_of(bert, laid)
    assert [
        part if isinstance(want, list) else len(part) for part, want in zip(parts, expected, strict=True)
    ] == expected


def test_cross_sides_are_both_orders(tokenizer):
    """Side 0 has A first and side 1 has B first, in each turn; swapping the answers swaps the sides."""
    rows = rows_of(["p one", "p two"], ["a one", "a two"], ["b one", "b two"])
    swapped = rows.assign(response_a=rows["response_b"], response_b=rows["response_a"])
    encoded, back = (encode_rows(table, tokenizer, 512, "none", "cross") for table in (rows, swapped))
    texts = ["p one", "a one", "b one", "p two", "a two", "b two"]
    for side, order in enumerate(([0, 1, 2, 3, 4, 5], [0, 2, 1, 3, 5, 4])):
        parts = [tokenizer.encode_texts([texts[i]])[0] for i in order]
        between = [piece for part in parts for piece in (part, tokenizer.between)][:-1]
        expected = np.concatenate([tokenizer.prefix, *between, tokenizer.suffix])
        assert encoded.token_ids[encoded.sides[0, side]].tolist() == expected.tolist()
    assert [ids.tolist() for ids in back.token_ids] == [ids.tolist() for ids in encoded.token_ids]
    assert back.sides.tolist() == encoded.sides[:, ::-1].tolist()
    assert not encoded.cut.any()
    tight = encode_rows(rows, tokenizer, 16, "none", "cross")
    assert tight.cut.all() and (tight.lengths <= 16).all()


def test_never_longer_than_max_length(tokenizer):
    """Whatever the turns, and however small the budget."""
    random = np.random.default_rng(0)
    for max_length in (16, 17, 40, 64):
        for _ in range(200):
            turns = [(ids(random.integers(0, 60)), ids(random.integers(0, 60))) for _ in range(random.integers(1, 6))]
            assert len(tokenizer.lay_out(turns, max_length)) <= max_length


def test_special_tokens_in_text_stay_text(tokenizer):
    """Text that spells special tokens gets none of their ids, in any spelling tried."""
    evil = "a</s> [SEP] [CLS] <mask>[MASK] <s><pad>[PAD] [[SEP]SEP] <</s>/s> \u200b[SEP] [UNK]<unk>"
    (encoded,) = tokenizer.encode_texts([evil])
    assert tokenizer.special_ids.isdisjoint(encoded.tolist())
    rows = rows_of([evil], [evil], [f"{evil} {evil}"])
    side = encode_rows(rows, tokenizer, 512, "none").token_ids[0].tolist()
    assert sum(i in tokenizer.special_ids for i in side) == 2 + len(tokenizer.between)


def test_newlines_survive(tokenizer):
    """Line breaks leave a trace in the ids of every tokenizer; only RoBERTa's keeps them itself."""
    broken, plain = tokenizer.encode_texts(["one\n\n two", "one two"])
    assert broken.tolist() != plain.tolist()
    assert tokenizer.tokenizer.unk_token_id not in broken
    assert (tokenizer.newline_marker is None) == (tokenizer.suffix.tolist() * 2 == tokenizer.between.tolist())


def test_newlines_are_marked_in_linear_time():
    """As the regular expression that says it would on short texts; long runs of spaces or line breaks cost nothing."""
    random = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(random.choice(list(" \n\t\r\x1c\u00a0ab"), random.integers(0, 9)))
        assert mark_newlines(text, "|") == re.sub(r"[^\S\n]*\n\s*", " | ", text)
    started = time.perf_counter()
    for run in (" ", "\n", " \n", "\t\n "):
        assert len(mark_newlines(f"a{run * 200_000}b", "|")) <= 200_002
    assert time.perf_counter() - started < 1


def test_long_text_is_not_cut_by_a_baked_in_limit(tokenizer):
    """The tiny WordPiece tokenizer.json truncates and pads at 12, as ELECTRA's does at 256."""
    (encoded,) = tokenizer.encode_texts(["one two three " * 50])
    assert len(encoded) >= 150
    (short,) = tokenizer.encode_texts(["one"])
    assert len(short) < 5


def test_equal_sides_are_stored_once_and_order_depends_on_ids_only(tokenizer, sample_rows):
    """Identical answers share one side; rows in another order give the same list of sides."""
    rows = sample_rows.head(30).copy()
    rows.at[3, "response_b"] = rows.at[3, "response_a"]
    encoded = encode_rows(rows, tokenizer, 64, "none")
    assert encoded.sides[3, 0] == encoded.sides[3, 1]
    again = encode_rows(rows[::-1], tokenizer, 64, "none")
    assert [i.tolist() for i in encoded.token_ids] == [i.tolist() for i in again.token_ids]
    assert (np.diff([len(ids) for ids in encoded.token_ids]) >= 0).all()


def test_what_was_cut(bert):
    """One side fits, the other is cut: 3 special tokens, a prompt and 100 answer tokens into 64."""
    encoded = encode_rows(rows_of(["one"], ["two"], ["one " * 100]), bert, 64, "none")
    assert (encoded.cut.tolist(), encoded.full_lengths.tolist()) == ([[False, True]], [[5, 104]])
    assert encoded.lengths.tolist() == [[5, 64]]


def test_clean_text():
    """ "ascii" works on parsed text: it strips what is not ASCII and collapses white space; "none" touches nothing."""
    text = "  Caf\u00e9\n\n \u4f60 ok\t"
    assert clean_text(text, "none") == text
    assert clean_text(text, "ascii") == "Caf ok"


def test_tokenizer_without_its_special_tokens_is_refused(backbone_folders):
    """As DeBERTa's tokenizer made from spm.model is in transformers 5.0 to 5.3."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folders["deberta-v2"])
    template = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = template
    with pytest.raises(UserError, match="special tokens are not in place"):
        SideTokenizer(tokenizer)
