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

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

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


def mark_newlines(text: str, marker: str) -> str:
    """`text` with each run of white space that holds a line break replaced by the marker between spaces.

    In time linear in the text; a regular expression would try every space of a long run.
    """
    if "\n" not in text:
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
        pad_id: the padding token's id.
    """

    def __init__(self, tokenizer):
        """Wrap a transformers tokenizer and check it."""
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        texts = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)}
        ids = {tokenizer.convert_tokens_to_ids(text) for text in texts} | set(tokenizer.all_special_ids)
        self.special_ids = frozenset(ids - {tokenizer.unk_token_id})
        self._spelled = re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if len(t) > 1))
        self._read_layout()
        self.newline_marker = self._choose_newline_marker()
        known = [m for m in _CUT_MARKERS if tokenizer.unk_token_id not in self._ids(m)]
        self.cut_marker = np.array(self._ids((known or [" "])[0]), dtype=np.int32)

    def encode_texts(self, texts: list[str]) -> list[Ids]:
        """Token ids of each text, without special tokens; one call of the tokenizer for every 1,000 texts."""
        encoded: list[Ids] = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            batch = [self._prepare(text) for text in texts[start : start + _BATCH_TEXTS]]
            for ids in self._call(batch):
                if not self.special_ids.isdisjoint(ids):  # a spelling that `_prepare` does not know
                    ids = [i for i in ids if i not in self.special_ids]
                encoded.append(np.array(ids, dtype=np.int32))
        return encoded

    def lay_out(self, turns: list[tuple[Ids, ...]], max_length: int) -> tuple[Ids, int]:
        """One side's token ids within `max_length`, and how many tokens of its answers are in them.

        Args:
            turns: (prompt ids, answer ids, ...) of each turn, first turn first; one answer, or two for a cross-encoder.
            max_length: most tokens, special tokens included.

        Returns:
            (T,) int32 ids with T <= max_length; the number of answer tokens kept.
        """
        left = max_length - len(self.prefix) - len(self.suffix)
        pieces: list[Ids] = []  # last piece first
        answer_tokens = 0
        for prompt, *answers in reversed(turns):
            budget = left - len(self.between) * (len(answers) + bool(pieces))
            wanted = [len(answer) for answer in answers]
            if pieces and budget < min(MIN_TURN_TOKENS, len(prompt) + sum(wanted)):
                break
            kept_prompt, _ = self._cut(prompt, max(int(PROMPT_SHARE * budget), budget - sum(wanted)))
            left = budget - len(kept_prompt)
            pieces += [self.between] if pieces else []
            for answer, share in reversed(list(zip(answers, share_budget(left, wanted), strict=True))):
                kept, seen = self._cut(answer, share)
                pieces += [kept, self.between]
                left -= len(kept)
                answer_tokens += seen
            pieces.append(kept_prompt)
        return np.concatenate([self.prefix, *reversed(pieces), self.suffix]), answer_tokens

    def decode(self, ids: Ids) -> str:
        """Token ids back to text, special tokens shown."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _prepare(self, text: str) -> str:
        text = self._spelled.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        if self.newline_marker is not None:
            text = mark_newlines(text, self.newline_marker)
        return text

    def _call(self, texts: list[str]) -> list[list[int]]:
        # tokenizer.json may switch truncation and padding on: the call switches them off
        off = dict.fromkeys(("add_special_tokens", "truncation", "padding", "return_attention_mask",
                             "return_token_type_ids", "verbose"), False)  # fmt: skip
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

    def _read_layout(self) -> None:
        """Learn prefix, between and suffix from how the tokenizer itself joins a pair, and check them."""
        name = type(self.tokenizer).__name__
        one, two = self._ids("one"), self._ids("two")
        pair = self.tokenizer("one", "two", truncation=False, padding=False)["input_ids"]
        start = _find(pair, one)
        second = _find(pair, two, after=start + len(one))
        if start < 0 or second < 0 or self.pad_id is None:
            raise UserError(f"{name}: does not join a pair of texts as expected. {_TOKENIZER_ADVICE}")
        prefix, between, suffix = pair[:start], pair[start + len(one) : second], pair[second + len(two) :]
        cls_id, sep_id = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        right = prefix == [cls_id] and suffix == [sep_id] and between in ([sep_id], [sep_id, sep_id])
        if not right or cls_id is None or sep_id is None or cls_id == sep_id:
            found = [self.tokenizer.convert_ids_to_tokens(part) for part in (prefix, between, suffix)]
            raise UserError(
                f"{name}: special tokens are not in place: before, between and after a pair of texts it puts {found}; "
                f"expected one {self.tokenizer.cls_token!r} first, one {self.tokenizer.sep_token!r} last. "
                f"{_TOKENIZER_ADVICE}"
            )
        self.prefix, self.between, self.suffix = (np.array(p, dtype=np.int32) for p in (prefix, between, suffix))

    def _cut(self, ids: Ids, budget: int) -> tuple[Ids, int]:
        """Head and tail of `ids` with the cut marker in between, within `budget` tokens; how many of `ids` were kept.

        The head gets the odd token.
        """
        budget = max(budget, 0)
        if len(ids) <= budget:
            return ids, len(ids)
        keep = budget - len(self.cut_marker)
        if keep < 2:
            return ids[:budget], budget
        tail = keep // 2
        return np.concatenate([ids[: keep - tail], self.cut_marker, ids[len(ids) - tail :]]), keep


_TOKENIZER_ADVICE = (
    "Use a folder whose tokenizer.json was written by transformers 5.4 or newer "
    "(AutoTokenizer.from_pretrained(...).save_pretrained(DIR))."
)


@dataclass(frozen=True)
class EncodedRows:
    """The sides of N rows as token ids, equal sides stored once.

    Attributes:
        token_ids: U arrays (T,) int32, one for each different side, shortest first (equal lengths: by ids), so
            that the order depends on nothing but the token ids.
        sides: (N, 2) int64, the index in `token_ids` of side 0 = A and side 1 = B.
        cut: (N, 2) bool, whether a part of the side's text did not fit.
        answer_seen: (N, 2) float, the share of the answer's tokens that fit.
    """

    token_ids: list[Ids]
    sides: np.ndarray
    cut: np.ndarray
    answer_seen: np.ndarray

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) tokens of each different side."""
        return np.array([len(ids) for ids in self.token_ids])

    def describe(self) -> dict[str, float]:
        """Token length quantiles of all sides, the share of cut rows and of answer tokens seen."""
        lengths = self.lengths[self.sides]
        return {
            "median_side_tokens": float(np.median(lengths)),
            "p95_side_tokens": float(np.percentile(lengths, 95)),
            "cut_row_share": float(self.cut.any(axis=1).mean()),
            "answer_token_share_seen": float(self.answer_seen.mean()),
        }


def share_budget(budget: int, wanted: list[int]) -> list[int]:
    """Equal shares of `budget` tokens, but none above `wanted`: what one does not need goes to the others."""
    shares = [0] * len(wanted)
    for served, place in enumerate(sorted(range(len(wanted)), key=lambda i: wanted[i])):
        shares[place] = min(wanted[place], max(budget, 0) // (len(wanted) - served))
        budget -= shares[place]
    return shares


def encode_rows(
    rows: pd.DataFrame, tokenizer: SideTokenizer, max_length: int, text_cleaning: str, architecture: str = "siamese"
) -> EncodedRows:
    """Token ids of both sides of every row; each different text is tokenised once.

    Args:
        rows: from `loading.read_rows`.
        tokenizer: the backbone's.
        max_length: most tokens of one side.
        text_cleaning: see `clean_text`.
        architecture: "siamese", a side is the prompt and one answer; "cross", the prompt and both answers in one order.
    """
    columns = [[[clean_text(turn, text_cleaning) for turn in turns] for turns in rows[name]]
               for name in (PROMPT, *RESPONSES)]  # fmt: skip
    index: dict[str, int] = {}
    for column in columns:
        for turns in column:
            for turn in turns:
                index.setdefault(turn, len(index))
    texts = tokenizer.encode_texts(list(index))
    laid: dict[bytes, int] = {}
    token_ids: list[Ids] = []
    sides = np.empty((len(rows), 2), dtype=np.int64)
    cut = np.empty((len(rows), 2), dtype=bool)
    answer_seen = np.ones((len(rows), 2))
    prompts, a, b = columns
    for side, answers in enumerate(((a, b), (b, a)) if architecture == "cross" else ((a,), (b,))):
        for row, cells in enumerate(zip(prompts, *answers, strict=True)):
            turns = [tuple(texts[index[text]] for text in turn) for turn in zip(*cells, strict=True)]
            ids, seen = tokenizer.lay_out(turns, max_length)
            answer_tokens = sum(len(answer) for _, *both in turns for answer in both)
            whole = len(tokenizer.prefix) + len(tokenizer.suffix) + answer_tokens + sum(len(turn[0]) for turn in turns)
            whole += len(tokenizer.between) * (sum(map(len, turns)) - 1)
            cut[row, side] = whole > max_length
            answer_seen[row, side] = seen / answer_tokens if answer_tokens else 1.0
            key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
            if key not in laid:
                laid[key] = len(token_ids)
                token_ids.append(ids)
            sides[row, side] = laid[key]
    # big-endian bytes are in the order of the numbers, and take a ninth of the memory of Python's
    order = sorted(range(len(token_ids)), key=lambda i: (len(token_ids[i]), token_ids[i].astype(">i4").tobytes()))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return EncodedRows([token_ids[i] for i in order], place[sides], cut, answer_seen)


def _find(ids: list[int], part: list[int], after: int = 0) -> int:
    """First index from `after` on at which `part` occurs in `ids`, or -1."""
    places = range(after, len(ids) - len(part) + 1)
    return next((i for i in places if ids[i : i + len(part)] == part), -1) if part else -1
