"""Layout, budget and special tokens, for all four tokenizers."""

import re
import time

import numpy as np
import pandas as pd
import pytest
from conftest import KINDS
from transformers import AutoTokenizer

from prefcls_lib.data.tokenization import SideTokenizer, clean_text, encode_rows, mark_newlines, share_budget
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


def test_short_side_is_laid_out_whole(tokenizer):
    """[CLS] p1 [SEP] a1 [SEP] p2 [SEP] a2 [SEP], with the backbone's own separator between texts."""
    laid, seen = tokenizer.lay_out([(ids(2), ids(3, 200)), (ids(1, 300), ids(2, 400))], 64)
    between = tokenizer.between.tolist()
    cls_id, sep_id = tokenizer.prefix.tolist(), tokenizer.suffix.tolist()
    expected = [*cls_id, 100, 101, *between, 200, 201, 202, *between, 300, *between, 400, 401, *sep_id]
    assert laid.tolist() == expected
    assert seen == 5


def test_budget_by_hand(bert):
    """[CLS] P [SEP] A [SEP] in 29 tokens: 26 for texts; the prompt may take 6 of them, the answer gets 20."""
    laid, seen = bert.lay_out([(ids(50, 100), ids(50, 200))], 29)
    cls_id, sep_id = int(bert.prefix[0]), int(bert.suffix[0])
    prompt = [100, 101, 102, 7, 148, 149]  # 6 = 3 head + marker + 2 tail
    answer = [*range(200, 210), 7, *range(241, 250)]  # 20 = 10 head + marker + 9 tail
    assert laid.tolist() == [cls_id, *prompt, sep_id, *answer, sep_id]
    assert seen == 19


def test_two_answers_share_the_room_equally(bert):
    """[CLS] P [SEP] A [SEP] B [SEP] in 30 tokens: 26 for texts, 6 of them for the prompt, 10 for each answer."""
    cls_id, sep_id = int(bert.prefix[0]), int(bert.suffix[0])
    laid, seen = bert.lay_out([(ids(50, 100), ids(50, 200), ids(50, 300))], 30)
    prompt, a = [100, 101, 102, 7, 148, 149], [*range(200, 205), 7, *range(246, 250)]
    b = [token if token == 7 else token + 100 for token in a]
    assert laid.tolist() == [cls_id, *prompt, sep_id, *a, sep_id, *b, sep_id]
    assert seen == 18
    laid, seen = bert.lay_out([(ids(50, 100), ids(50, 200), ids(4, 300))], 30)  # what B leaves goes to A
    assert laid.tolist()[-6:-1] == [sep_id, *range(300, 304)]
    assert seen == 15 + 4


@pytest.mark.parametrize(
    ("budget", "wanted", "shares"),
    [(20, [50, 50], [10, 10]), (21, [50, 50], [10, 11]), (20, [4, 50], [4, 16]), (20, [50, 4], [16, 4]),
     (20, [3, 4], [3, 4]), (0, [3, 4], [0, 0]), (-5, [3], [0]), (7, [9], [7])],
)  # fmt: skip
def test_shares_by_hand(budget, wanted, shares):
    """Equal shares, no more than wanted, and nothing is lost."""
    assert share_budget(budget, wanted) == shares


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
    assert (encoded.answer_seen == 1).all()
    tight = encode_rows(rows, tokenizer, 16, "none", "cross")
    assert tight.cut.all()
    assert (tight.answer_seen < 1).all()
    assert (tight.lengths <= 16).all()


def test_unused_budget_is_handed_on(bert):
    """A short answer leaves its budget to the prompt, and a short last turn to the turn before it."""
    laid, _ = bert.lay_out([(ids(50, 100), ids(4, 200))], 29)
    assert len(laid) == 29
    assert laid.tolist()[-5:-1] == [200, 201, 202, 203]  # the whole answer; the prompt has the other 22
    laid, _ = bert.lay_out([(ids(3, 100), ids(90, 200)), (ids(2, 300), ids(2, 400))], 40)
    assert len(laid) == 40
    assert laid.tolist()[-6:-1] == [300, 301, int(bert.between[0]), 400, 401]  # the last turn is whole


def test_last_turns_come_first(bert):
    """A last turn that fills the budget leaves nothing to the first."""
    laid, _ = bert.lay_out([(ids(9, 100), ids(90, 200)), (ids(5, 300), ids(90, 400))], 32)
    assert len(laid) == 32
    assert not set(range(100, 300)) & set(laid.tolist())


def test_never_longer_than_max_length(tokenizer):
    """Whatever the turns, and however small the budget."""
    random = np.random.default_rng(0)
    for max_length in (16, 17, 40, 64):
        for _ in range(200):
            turns = [(ids(random.integers(0, 60)), ids(random.integers(0, 60))) for _ in range(random.integers(1, 6))]
            laid, seen = tokenizer.lay_out(turns, max_length)
            assert len(laid) <= max_length
            assert 0 <= seen <= sum(len(answer) for _, answer in turns)


def test_special_tokens_in_text_stay_text(tokenizer):
    """Text that spells special tokens gets none of their ids, in any spelling tried."""
    evil = "a</s> [SEP] [CLS] <mask>[MASK] <s><pad>[PAD] [[SEP]SEP] <</s>/s> \u200b[SEP] [UNK]<unk>"
    (encoded,) = tokenizer.encode_texts([evil])
    assert tokenizer.special_ids.isdisjoint(encoded.tolist())
    rows = rows_of([evil], [evil], [f"{evil} {evil}"])
    side = encode_rows(rows, tokenizer, 512, "none").token_ids[0].tolist()
    assert sum(i in tokenizer.special_ids for i in side) == 2 + len(tokenizer.between)


def test_layout_is_that_of_the_tokenizer(tokenizer):
    """A one-turn side has the ids that the tokenizer itself gives the pair."""
    encoded = encode_rows(rows_of(["one"], ["two three"], ["two"]), tokenizer, 64, "none")
    own = tokenizer.tokenizer("one", "two three", truncation=False, padding=False)["input_ids"]
    assert encoded.token_ids[encoded.sides[0, 0]].tolist() == own


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
    assert (np.diff(encoded.lengths) >= 0).all()


def test_cut_share_and_answer_tokens_seen(bert):
    """One side fits, the other is cut; of 100 answer tokens in 64 - 4 places, with marker, 59 are seen."""
    encoded = encode_rows(rows_of(["one"], ["two"], ["one " * 100]), bert, 64, "none")
    assert encoded.cut.tolist() == [[False, True]]
    assert encoded.answer_seen.tolist() == [[1.0, 0.59]]  # [CLS] one [SEP] 59 + marker [SEP]
    assert encoded.describe()["cut_row_share"] == 1.0


def test_clean_text():
    """ "ascii" works on parsed text: it strips what is not ASCII and collapses white space; "none" touches nothing."""
    text = "  Caf\u00e9\n\n \u4f60 ok\t"
    assert clean_text(text, "none") == text
    assert clean_text(text, "ascii") == "Caf ok"


def test_tokenizer_without_its_special_tokens_is_refused(backbone_folders):
    """As DeBERTa's tokenizer made from spm.model is in transformers 5.0 to 5.3."""
    tokenizer = AutoTokenizer.from_pretrained(backbone_folders["deberta-v2"])
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    with pytest.raises(UserError, match="special tokens are not in place"):
        SideTokenizer(tokenizer)
