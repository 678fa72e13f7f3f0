"""Turns to token ids: text cleaning, the layout of a side, and its token budget.

A side is one conversation with that side's answers, each turn's prompt and answer in order:

    [CLS] prompt 1 [SEP] answer 1 [SEP] prompt 2 [SEP] answer 2 [SEP]        (RoBERTa: <s> ... </s></s> ... </s>)

For a cross-encoder each turn has both answers, A first in side 0 and B first in side 1:

    [CLS] prompt 1 [SEP] answer A 1 [SEP] answer B 1 [SEP] ...

If it is longer than `max_length`, the budget of tokens goes to the last turns first. Within a turn the prompt may
take PROMPT_SHARE of the budget, or more if the answers are short; two answers share the rest equally, and what the
shorter one does not need goes to the longer one. A text that must be cut keeps its head and its tail with a marker in
between. Tokens that a turn does not use go to the turn before it.

Only this layout writes special tokens. Text that spells one ("</s>", "[SEP]", "<mask>") is split before it is
tokenised, and the ids are checked afterwards.
"""

import re

import numpy as np
import pandas as pd

from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import PROMPT, RESPONSES
from prefcls_lib.runtime.files import UserError

PROMPT_SHARE = 0.25  # of a turn's budget, if the answers need the rest
MIN_TURN_TOKENS = 16  # an earlier turn with a smaller budget is left out entirely
_CUT_MARKERS = ("…", "...")  # the first that the vocabulary has
_NEWLINE_MARKERS = ("¶", "|", ";")  # stands for line breaks where a tokenizer drops them
_BATCH_TEXTS = 1000

Ids = np.ndarray  # (T,) int32 token ids of a text or of a side


def clean_text(text: str, text_cleaning: str) -> str:
    """Clean one turn: "none" touches nothing; "ascii" removes what is not ASCII and collapses white space.

    "ascii" is the original study's step, applied to the parsed text (in the raw CSV cell every character is ASCII).
    """
    return text if text_cleaning == "none" else " ".join(text.encode("ascii", "ignore").decode("ascii").split())


def mark_newlines(text: str, marker: str | None) -> str:
    """`text` with each run of white space that holds a line break replaced by the marker, if any, between spaces.

    In time linear in the text; a regular expression would try every space of a long run.
    """
    if marker is None or "\n" not in text:
        return text
    first, *middle, last = text.split("\n")
    return f" {marker} ".join([first.rstrip(), *filter(None, map(str.strip, middle)), last.lstrip()])


class SideTokenizer:
    """A backbone's tokenizer with what the layout needs: its special tokens, checked, and two markers.

    Attributes:
        prefix, between, suffix: ids before the first text, between two texts, after the last.
        cut_marker: ids that mark where the middle of a text was cut out.
        newline_marker: the text that stands for line breaks, or None where the tokenizer keeps them.
        special_ids: ids that no text may ever produce.
    """

    def __init__(self, tokenizer):
        """Wrap a transformers tokenizer and check it."""
        self.tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        texts = {*tokenizer.all_special_tokens, *added}
        ids = {tokenizer.convert_tokens_to_ids(text) for text in texts} | set(tokenizer.all_special_ids)
        self.special_ids = frozenset(ids - {tokenizer.unk_token_id})
        self._spelled = re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if len(t) > 1))
        self.prefix, self.between, self.suffix = (np.array(part, dtype=np.int32) for part in self._read_layout())
        self.newline_marker = self._choose_newline_marker()
        known = [m for m in _CUT_MARKERS if tokenizer.unk_token_id not in self._ids(m)]
        self.cut_marker = np.array(self._ids((known or [" "])[0]), dtype=np.int32)

    def encode_texts(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text, without special tokens; one call of the tokenizer for every 1,000 texts."""
        encoded: list[Ids] = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            batch = texts[start : start + _BATCH_TEXTS]
            split = [self._spelled.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) for text in batch]
            for ids in self._call([mark_newlines(text, self.newline_marker) for text in split]):
                if not self.special_ids.isdisjoint(ids):  # a spelling that `_spelled` does not know
                    ids = [i for i in ids if i not in self.special_ids]
                encoded.append(np.array(ids, dtype=np.int32))
        return encoded

    def lay_out(self, turns: list[tuple[Ids, ...]], max_length: int) -> Ids:
        """One side's token ids: at most `max_length`, special tokens included.

        `turns`: (prompt ids, answer ids, ...) of each turn, first turn first; one answer, or two for a cross-encoder.
        """
        left = max_length - len(self.prefix) - len(self.suffix)
        kept: list[Ids] = []  # prompts and answers of the turns that fit
        for turn in reversed(turns):
            prompt, *answers = turn
            left -= len(self.between) * (len(answers) + bool(kept))
            wanted = sum(map(len, answers))
            if kept and left < min(MIN_TURN_TOKENS, len(prompt) + wanted):
                break
            cut = [self._cut(prompt, max(int(PROMPT_SHARE * left), left - wanted)), *answers]
            left -= len(cut[0])
            shortest_first = sorted(range(1, len(turn)), key=lambda place: len(turn[place]))
            for served, place in enumerate(shortest_first):  # what one does not need goes to the next
                cut[place] = self._cut(turn[place], left // (len(answers) - served))
                left -= len(cut[place])
            kept = cut + kept
        pieces = [piece for text in kept for piece in (self.between, text)][1:]
        return np.concatenate([self.prefix, *pieces, self.suffix])

    def decode(self, ids: Ids) -> str:
        """Token ids back to text, special tokens shown."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _call(self, texts: list[str]) -> list[list[int]]:
        # tokenizer.json may switch truncation and padding on: the call switches them off
        off = dict.fromkeys(("add_special_tokens", "truncation", "padding", "verbose"), False)
        return self.tokenizer(texts, **off)["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self._call([text])[0]

    def _choose_newline_marker(self) -> str | None:
        """The known marker of fewest tokens (one, in every real vocabulary), where line breaks are dropped."""
        if self._ids("a\nb") != self._ids("a b"):
            return None
        marked = {marker: self._ids(f"a {marker} b") for marker in _NEWLINE_MARKERS}
        known = [marker for marker, ids in marked.items() if self.tokenizer.unk_token_id not in ids]
        return min(known, key=lambda marker: len(marked[marker]), default=None)

    def _read_layout(self) -> tuple[list[int], list[int], list[int]]:
        """Prefix, between and suffix: those with which the tokenizer itself joins a pair."""
        tokenizer = self.tokenizer
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        pair = tokenizer("one", "two", truncation=False, padding=False)["input_ids"]
        for between in ([sep_id], [sep_id, sep_id]):
            expected = [cls_id, *self._ids("one"), *between, *self._ids("two"), sep_id]
            if pair == expected and None not in (cls_id, sep_id, tokenizer.pad_token_id) and cls_id != sep_id:
                return [cls_id], between, [sep_id]
        raise UserError(
            f"{type(tokenizer).__name__}: special tokens are not in place: a pair of texts becomes "
            f"{tokenizer.convert_ids_to_tokens(pair)}; expected are {tokenizer.cls_token!r} first, "
            f"{tokenizer.sep_token!r} last, and a padding token. Use a folder whose tokenizer.json was written by "
            "transformers 5.4 or newer (AutoTokenizer.from_pretrained(...).save_pretrained(DIR))."
        )

    def _cut(self, ids: Ids, budget: int) -> Ids:
        """`ids`, or their head (which gets the odd token), cut marker and tail, within `budget` tokens."""
        budget = max(budget, 0)
        keep = budget - len(self.cut_marker)
        if len(ids) <= budget or keep < 2:
            return ids[:budget]
        tail = keep // 2
        return np.concatenate([ids[: keep - tail], self.cut_marker, ids[len(ids) - tail :]])


def encode_rows(
    rows: pd.DataFrame, tokenizer: SideTokenizer, max_length: int, text_cleaning: str, architecture: str = "siamese"
) -> Examples:
    """Token ids of both sides of every row, at most `max_length` a side; each different text is tokenised once.

    Equal sides are stored once, as int32 and shortest first (equal lengths: by ids), so that the order depends on
    nothing but the token ids.
    `architecture`: "siamese", a side is the prompt and one answer; "cross", the prompt and both answers in one order.
    """
    columns = [[[clean_text(turn, text_cleaning) for turn in turns] for turns in rows[name]]
               for name in (PROMPT, *RESPONSES)]  # fmt: skip
    texts = list(dict.fromkeys(turn for column in columns for turns in column for turn in turns))
    ids_of = dict(zip(texts, tokenizer.encode_texts(texts), strict=True))
    sides = np.empty((len(rows), 2), dtype=object)
    full_lengths = np.empty((len(rows), 2), dtype=np.int64)
    prompts, a, b = columns
    for side, answers in enumerate(((a, b), (b, a)) if architecture == "cross" else ((a,), (b,))):
        for row, cells in enumerate(zip(prompts, *answers, strict=True)):
            turns = [tuple(map(ids_of.__getitem__, turn)) for turn in zip(*cells, strict=True)]
            # big-endian bytes are in the order of the numbers, and take a ninth of the memory of Python's
            sides[row, side] = tokenizer.lay_out(turns, max_length).astype(">i4").tobytes()
            full_lengths[row, side] = len(tokenizer.lay_out(turns, 10**9))
    different = sorted(set(sides.flat), key=lambda ids: (len(ids), ids))
    place = {ids: number for number, ids in enumerate(different)}
    numbers = np.array([place[ids] for ids in sides.flat], dtype=np.int64).reshape(sides.shape)
    token_ids = [np.frombuffer(ids, ">i4").astype(np.int32) for ids in different]
    return Examples(token_ids, numbers, full_lengths=full_lengths)
