"""Structure features: length, lists, code, refusals and the like, which predict the vote from the form of the answers.

`ANSWER_FEATURES` measure one answer, `ROW_FEATURES` the prompt and both answers. The columns are differences of the
former (A minus B: they change sign when A and B change places), and means, distances and the latter, which stay.
`SIGNS` tells them apart, so that swapping the answers is exactly `columns * SIGNS`.

Each function takes time in proportion to the length of its text: no run of characters is scanned twice.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import RESPONSES

_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"^[^\S\n]*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_HEADING = re.compile(r"^[^\S\n]*#{1,6}\s|\*\*[^*\n]+\*\*", re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(?:as an ai|language model|i(?:'| a)m sorry|i apologi[sz]e|i can(?:no|')t (?:provide|assist|help|"
    r"fulfill|create|write|generate|engage)|i am (?:not able|unable)|i'm (?:not able|unable)|not appropriate)\b"
)
_FUNCTION_WORDS = frozenset((
    "the", "a", "an", "of", "to", "and", "in", "is", "it", "that", "for", "on", "with", "as", "are", "be", "this",
    "by", "or", "from", "at", "was", "you", "your", "can", "have", "has", "not", "but", "they", "their", "which",
    "will", "if", "we", "i", "more", "its",
))  # fmt: skip
_TYPICAL_LOG_CHARS = 6.7  # of an answer in the competition: products with length are near zero there


@dataclass(frozen=True)
class Text:
    """A prompt or an answer: its turns, and what the functions below ask of it more than once."""

    turns: list[str]

    @cached_property
    def whole(self) -> str:
        """All turns, a line end between two."""
        return "\n".join(self.turns)

    @cached_property
    def words(self) -> list[str]:
        """Its words in lower case, in order."""
        return _WORD.findall(self.whole.lower())

    @cached_property
    def vocabulary(self) -> set[str]:
        """Its different words."""
        return set(self.words)

    def non_ascii_share(self) -> float:
        """Of its characters."""
        text = self.whole
        return 0.0 if text.isascii() else 1 - len(text.encode("ascii", "ignore")) / len(text)

    def digit_share(self) -> float:
        """Of its characters."""
        text = self.whole
        digits = sum(map(text.count, "0123456789")) if text.isascii() else sum(map(str.isdigit, text))
        return _share(digits, len(text))

    def has_empty_turn(self) -> bool:
        """Whether a turn is empty, or null."""
        return any(not turn.strip() for turn in self.turns)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# name: value of an answer, given the prompt
ANSWER_FEATURES: dict[str, Callable[[Text, Text], float]] = {
    "log_chars": lambda answer, _: np.log1p(len(answer.whole)),
    "log_words": lambda answer, _: np.log1p(len(answer.words)),
    "log_last_chars": lambda answer, _: np.log1p(len(answer.turns[-1])),
    "log_lines": lambda answer, _: np.log1p(answer.whole.count("\n")),
    "log_list_items": lambda answer, _: np.log1p(len(_LIST_ITEM.findall(answer.whole))),
    "log_headings": lambda answer, _: np.log1p(len(_HEADING.findall(answer.whole))),
    "log_code_fences": lambda answer, _: np.log1p(answer.whole.count("```")),
    "log_questions": lambda answer, _: np.log1p(answer.whole.count("?")),
    "log_exclamations": lambda answer, _: np.log1p(answer.whole.count("!")),
    "non_ascii_share": lambda answer, _: answer.non_ascii_share(),
    "digit_share": lambda answer, _: answer.digit_share(),
    "distinct_word_share": lambda answer, _: _share(len(answer.vocabulary), len(answer.words)),
    "prompt_overlap": lambda answer, prompt: _share(len(answer.vocabulary & prompt.vocabulary), len(prompt.vocabulary)),
    "refusal": lambda answer, _: _REFUSAL.search(answer.whole.lower()) is not None,
    "empty": lambda answer, _: answer.has_empty_turn(),
    "unfinished": lambda answer, _: answer.turns[-1].rstrip()[-1:].isalnum(),
    "repeated_pairs": lambda answer, _: 1 - _share(len(set(pairwise(answer.words))), len(answer.words) - 1)
    if len(answer.words) > 1 else 0.0,
    "log_different_words": lambda answer, _: np.log1p(len(answer.vocabulary)),
    "function_words": lambda answer, _: _share(sum(map(_FUNCTION_WORDS.__contains__, answer.words)), len(answer.words)),
    "log_paragraphs": lambda answer, _: np.log1p(answer.whole.count("\n\n")),
}  # fmt: skip
# name: value of a row, given prompt, A and B
ROW_FEATURES: dict[str, Callable[[Text, Text, Text], float]] = {
    "log_prompt_chars": lambda prompt, a, b: np.log1p(len(prompt.whole)),
    "log_turns": lambda prompt, a, b: np.log1p(len(prompt.turns)),
    "prompt_has_code": lambda prompt, a, b: any(mark in prompt.whole for mark in ("```", "def ", "{")),
    "prompt_non_ascii_share": lambda prompt, a, b: prompt.non_ascii_share(),
    "answer_overlap": lambda prompt, a, b: _share(len(a.vocabulary & b.vocabulary), len(either))
    if (either := a.vocabulary | b.vocabulary) else 1.0,
    "identical": lambda prompt, a, b: a.turns == b.turns,
}  # fmt: skip
DISTANCES = ("log_chars", "log_list_items", "log_code_fences", "refusal", "empty", "non_ascii_share")
TIMES_LENGTH = tuple(ANSWER_FEATURES)[:7]  # differences that count for more or less where the answers are long
FEATURE_NAMES = (
    *(f"diff_{name}" for name in ANSWER_FEATURES),
    *(f"mean_{name}" for name in ANSWER_FEATURES),
    *(f"dist_{name}" for name in DISTANCES),
    *ROW_FEATURES,
    *(f"diff_{name}_times_length" for name in TIMES_LENGTH),
)
SIGNS = np.array([-1.0 if name.startswith("diff_") else 1.0 for name in FEATURE_NAMES])


def compute_features(prompts: list[Text], a: list[Text], b: list[Text]) -> np.ndarray:
    """Raw structure features (N, F) float64, columns `FEATURE_NAMES`, of prompts and answers; finite for any text."""
    sides = [[[measure(answer, prompt) for measure in ANSWER_FEATURES.values()]
              for answer, prompt in zip(answers, prompts, strict=True)] for answers in (a, b)]  # fmt: skip
    of_a, of_b = np.array(sides, dtype=np.float64).reshape(2, len(prompts), len(ANSWER_FEATURES))
    of_row = [[measure(*texts) for measure in ROW_FEATURES.values()] for texts in zip(prompts, a, b, strict=True)]
    places = list(ANSWER_FEATURES)
    difference, mean = of_a - of_b, (of_a + of_b) / 2
    length = mean[:, [places.index("log_chars")]] - _TYPICAL_LOG_CHARS
    return np.column_stack([
        difference, mean, np.abs(difference[:, [places.index(name) for name in DISTANCES]]),
        np.array(of_row, dtype=np.float64).reshape(len(prompts), len(ROW_FEATURES)),
        difference[:, : len(TIMES_LENGTH)] * length,
    ])  # fmt: skip


def empty_answers(rows: pd.DataFrame) -> np.ndarray:
    """(N, 2) bool: the answer of side 0 = A, 1 = B has an empty (or null) turn."""
    return np.array([[Text(turns).has_empty_turn() for turns in rows[name]] for name in RESPONSES], dtype=bool).T


def identical_answers(rows: pd.DataFrame) -> np.ndarray:
    """(N,) bool: both answers are the same text in every turn."""
    return np.array([a == b for a, b in zip(rows[RESPONSES[0]], rows[RESPONSES[1]], strict=True)], dtype=bool)
