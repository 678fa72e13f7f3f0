"""Structure features: length, lists, code, refusals and the like, which predict the vote without reading the answers.

Every column is either antisymmetric (A minus B: it changes sign when A and B change places) or symmetric (a sum, a
distance, a property of the prompt: it stays). `SIGNS` tells them apart, so that swapping the answers is exactly
`features * SIGNS`. Columns are standardised on training rows: symmetric ones by mean and standard deviation,
antisymmetric ones by their root mean square alone, which keeps the swap exact.

A network's head reads `compute_features`. The baselines read `DENSE`, a second table: these columns and more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import PROMPT, RESPONSES

# Each of these takes time in proportion to the length of any text: no run of characters is looked through twice.
_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"^[^\S\n]*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_HEADING = re.compile(r"^[^\S\n]*#{1,6}\s|\*\*[^*\n]+\*\*", re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(?:as an ai|language model|i(?:'| a)m sorry|i apologi[sz]e|i can(?:no|')t (?:provide|assist|help|"
    r"fulfill|create|write|generate|engage)|i am (?:not able|unable)|i'm (?:not able|unable)|not appropriate)\b"
)
CLIP = 4.0  # standardised values are clipped to +-CLIP, so that one very long answer does not dominate a fit

# of each answer, all its turns joined: A minus B, the mean, and for some the distance |A - B|
SIDE_FEATURES = (
    "log_chars", "log_words", "log_last_chars", "log_lines", "log_list_items", "log_headings", "log_code_fences",
    "log_questions", "log_exclamations", "non_ascii_share", "digit_share", "distinct_word_share", "prompt_overlap",
    "refusal", "empty", "unfinished",
)  # fmt: skip
DISTANCES = ("log_chars", "log_list_items", "log_code_fences", "refusal", "empty", "non_ascii_share")
ROW_FEATURES = ("log_prompt_chars", "log_turns", "prompt_has_code", "prompt_non_ascii_share",
                "answer_overlap", "identical")  # fmt: skip
FEATURE_NAMES = (
    *(f"diff_{name}" for name in SIDE_FEATURES),
    *(f"mean_{name}" for name in SIDE_FEATURES),
    *(f"dist_{name}" for name in DISTANCES),
    *ROW_FEATURES,
)
SIGNS = np.array([-1.0 if name.startswith("diff_") else 1.0 for name in FEATURE_NAMES])

# What the baselines read of an answer besides SIDE_FEATURES: see `measure_answer`.
MEASURES = ("repeated_pairs", "log_different_words", "function_words", "log_paragraphs")
FUNCTION_WORDS = frozenset((
    "the", "a", "an", "of", "to", "and", "in", "is", "it", "that", "for", "on", "with", "as", "are", "be", "this",
    "by", "or", "from", "at", "was", "you", "your", "can", "have", "has", "not", "but", "they", "their", "which",
    "will", "if", "we", "i", "more", "its",
))  # fmt: skip
TYPICAL_LOG_CHARS = 6.7  # of an answer in the competition: products with length are near zero there


@dataclass(frozen=True)
class DenseColumn:
    """A column that the baselines read: the factor that a swap of the answers gives it, and its values.

    `values` takes features (N,) by the names of FEATURE_NAMES, and measures (N, 2) of sides A, B by those of MEASURES.
    """

    name: str
    sign: float
    values: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def _feature(name: str, sign: float) -> DenseColumn:
    return DenseColumn(name, sign, lambda known: known[name])


def _difference(name: str) -> DenseColumn:
    return DenseColumn(f"diff_{name}", -1.0, lambda known: known[name][:, 0] - known[name][:, 1])


def _mean(name: str) -> DenseColumn:
    return DenseColumn(f"mean_{name}", 1.0, lambda known: known[name].mean(axis=1))


def _times_length(name: str) -> DenseColumn:
    """A difference counts for more or less where the answers are long."""
    length = "mean_log_chars"
    return DenseColumn(f"{name}_times_length", -1.0, lambda known: known[name] * (known[length] - TYPICAL_LOG_CHARS))


DENSE = (
    *map(_feature, FEATURE_NAMES, SIGNS),
    *map(_difference, MEASURES),
    *map(_mean, MEASURES),
    *(_times_length(f"diff_{name}") for name in SIDE_FEATURES[:7]),
)
DENSE_SIGNS = np.array([column.sign for column in DENSE])


def compute_features(rows: pd.DataFrame) -> np.ndarray:
    """Raw structure features of each row, (N, F) float64, columns `FEATURE_NAMES`; finite for any text."""
    features = [
        _row_features(prompt, a, b)
        for prompt, a, b in zip(rows[PROMPT], rows[RESPONSES[0]], rows[RESPONSES[1]], strict=True)
    ]
    return np.array(features, dtype=np.float64).reshape(len(rows), len(FEATURE_NAMES))


def measure_answer(turns: Sequence[str], words: list[str]) -> tuple[float, ...]:
    """MEASURES of one answer: the share of word pairs that it repeats, its vocabulary, function words, paragraphs.

    `words`: `find_words` of the turns joined by line ends.
    """
    pairs = len(words) - 1
    return (
        1 - len(set(pairwise(words))) / pairs if pairs > 0 else 0.0,
        np.log1p(len(set(words))),
        _share(sum(map(FUNCTION_WORDS.__contains__, words)), len(words)),
        np.log1p("\n".join(turns).count("\n\n")),
    )


def compute_dense(features: np.ndarray, measures: np.ndarray) -> np.ndarray:
    """The columns DENSE (N, D) of `compute_features` (N, F) and of measures (N, 2, len(MEASURES)) of sides A, B."""
    known = dict(zip(FEATURE_NAMES, features.T, strict=True))
    known |= {name: measures[:, :, number] for number, name in enumerate(MEASURES)}
    return np.column_stack([column.values(known) for column in DENSE])


def find_words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return _WORD.findall(text.lower())


def empty_answers(rows: pd.DataFrame) -> np.ndarray:
    """(N, 2) bool: the answer of side 0 = A, 1 = B has an empty (or null) turn."""
    return np.array(
        [[any(not turn.strip() for turn in turns) for turns in sides] for sides in rows[list(RESPONSES)].to_numpy()]
    ).reshape(len(rows), 2)


def identical_answers(rows: pd.DataFrame) -> np.ndarray:
    """(N,) bool: both answers are the same text in every turn."""
    return np.array([a == b for a, b in zip(rows[RESPONSES[0]], rows[RESPONSES[1]], strict=True)], dtype=bool)


@dataclass(frozen=True)
class FeatureScaler:
    """Standardisation of columns, fitted on training rows and saved with the model.

    `center` is zero for antisymmetric columns, so `transform(x * signs) == transform(x) * signs` exactly.
    """

    center: np.ndarray  # (F,)
    scale: np.ndarray  # (F,)

    @classmethod
    def fit(cls, features: np.ndarray, signs: np.ndarray = SIGNS) -> "FeatureScaler":
        """Fit on raw features (N, F); a constant column gets scale 1. `signs`: of the columns."""
        center = np.where(signs > 0, features.mean(axis=0), 0.0)
        scale = np.sqrt(((features - center) ** 2).mean(axis=0))
        return cls(center, np.where(scale > 1e-8, scale, 1.0))

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Standardise and clip raw features (N, F) to +-CLIP."""
        return np.clip((features - self.center) / self.scale, -CLIP, CLIP)

    def to_dict(self) -> dict:
        """Plain values for JSON; floats keep every bit."""
        return {"names": FEATURE_NAMES, "center": self.center.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, state: dict) -> "FeatureScaler":
        """Read `to_dict` back.

        Raises:
            ValueError: the state was saved for other features.
        """
        if tuple(state["names"]) != FEATURE_NAMES:
            raise ValueError("the saved structure features are not those of this version of prefcls_lib")
        return cls(np.array(state["center"]), np.array(state["scale"]))


def _row_features(prompt: list[str], a: list[str], b: list[str]) -> list[float]:
    prompt_text = "\n".join(prompt)
    prompt_words = set(find_words(prompt_text))
    side_a, words_a = _side_features(a, prompt_words)
    side_b, words_b = _side_features(b, prompt_words)
    either = len(words_a | words_b)
    distances = [abs(side_a[i] - side_b[i]) for i in map(SIDE_FEATURES.index, DISTANCES)]
    return [
        *(x - y for x, y in zip(side_a, side_b, strict=True)),
        *((x + y) / 2 for x, y in zip(side_a, side_b, strict=True)),
        *distances,
        np.log1p(len(prompt_text)),
        np.log1p(len(prompt)),
        float("```" in prompt_text or "def " in prompt_text or "{" in prompt_text),
        _share(_count_non_ascii(prompt_text), len(prompt_text)),
        len(words_a & words_b) / either if either else 1.0,
        float(a == b),
    ]


def _side_features(turns: list[str], prompt_words: set[str]) -> tuple[list[float], set[str]]:
    """Values of SIDE_FEATURES for one answer, and its set of words."""
    text = "\n".join(turns)
    lower = text.lower()
    found = _WORD.findall(lower)
    words = set(found)
    last = turns[-1].rstrip()
    features = [
        np.log1p(len(text)),
        np.log1p(len(found)),
        np.log1p(len(turns[-1])),
        np.log1p(text.count("\n")),
        np.log1p(len(_LIST_ITEM.findall(text))),
        np.log1p(len(_HEADING.findall(text))),
        np.log1p(text.count("```")),
        np.log1p(text.count("?")),
        np.log1p(text.count("!")),
        _share(_count_non_ascii(text), len(text)),
        _share(_count_digits(text), len(text)),
        _share(len(words), len(found)),
        _share(len(words & prompt_words), len(prompt_words)),
        float(_REFUSAL.search(lower) is not None),
        float(any(not turn.strip() for turn in turns)),
        float(bool(last) and last[-1].isalnum()),
    ]
    return features, words


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _count_non_ascii(text: str) -> int:
    return 0 if text.isascii() else len(text) - len(text.encode("ascii", "ignore"))


def _count_digits(text: str) -> int:
    return sum(map(text.count, "0123456789")) if text.isascii() else sum(map(str.isdigit, text))
