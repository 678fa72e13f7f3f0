"""load: a finished run, one of its models, or a blend of runs, as an object that predicts on texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.baselines.out_of_fold import BASELINE_FILE, BaselineMean
from prefcls_lib.data.loading import parse_rows
from prefcls_lib.data.schema import ID, TEXT_COLUMNS
from prefcls_lib.ensemble.blend import mix, read_blend
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.models.saved import SavedNetwork, load_model
from prefcls_lib.pipeline.folder import model_folders
from prefcls_lib.runtime.files import UserError, read_json, shown

Text = str | Sequence[str]  # of one turn, or a text a turn


@dataclass(frozen=True)
class Predictor:
    """Fitted models that predict which of two answers people prefer; made by `prefcls_lib.load`.

    Attributes:
        classes: the classes in the order of the columns of `predict_proba`.
        runs: the models of each run; their probabilities are averaged.
        blend: weights and calibration of the runs.
    """

    runs: tuple[tuple[SavedNetwork | BaselineMean, ...], ...] = field(repr=False)
    blend: Blend
    classes: tuple[str, ...] = ("model_a", "model_b", "tie")

    def predict_proba(
        self, prompts: Sequence[Text], responses_a: Sequence[Text], responses_b: Sequence[Text]
    ) -> np.ndarray:
        """Probabilities that people prefer answer A, answer B, or neither.

        Args:
            prompts, responses_a, responses_b: N texts, or lists of texts, one a turn (cells of the CSV are JSON).

        Returns:
            (N, 3) float64, P(A wins), P(B wins), P(tie), each row summing to 1. If A and B are exchanged, the first
            two columns are exchanged, exactly; of a network with head=concat only about.

        Example:
            >>> model = prefcls_lib.load("runs/demo/02_roberta_base-minilm")
            >>> model.predict_proba(["What is 2 + 3?"], ["5"], ["2 + 3 is 6."]).round(3)
        """
        return self.predict_rows(_make_rows(prompts, responses_a, responses_b))

    def predict(self, prompts: Sequence[Text], responses_a: Sequence[Text], responses_b: Sequence[Text]) -> np.ndarray:
        """(N,) the most probable of `classes`, see `predict_proba`."""
        return np.array(self.classes)[self.predict_proba(prompts, responses_a, responses_b).argmax(axis=1)]

    def predict_rows(self, rows: pd.DataFrame, label: str = "") -> np.ndarray:
        """Probabilities (N, 3) of rows from `loading.read_rows`; `label` shows progress bars with this name."""
        predictions = []
        for models in self.runs:
            inputs = models[0].read_inputs(rows)  # the models of a run share tokenizer and text settings
            predictions.append([model.predict_proba(inputs, label) for model in models])
        return mix(predictions, self.blend)


def load(path: str | Path) -> Predictor:
    """Load what a run has left: a run folder, one of its model folders (model/fold0), or a blend.json."""
    path = Path(path)
    folders, blend = read_blend(path) if path.is_file() else ([path], Blend((1.0,), Calibration()))
    return Predictor(tuple(map(_load_run, folders)), blend)


def _load_run(path: Path) -> tuple[SavedNetwork | BaselineMean, ...]:
    if any((path / name).is_file() for name in ("preference.json", BASELINE_FILE)):
        return (load_model(path),)
    read_json(path / "result.json")  # a run that has it is complete
    return tuple(map(load_model, model_folders(path)))


def _make_rows(*columns: Sequence[Text]) -> pd.DataFrame:
    """Prompts, answers A and answers B as rows of `loading.read_rows`."""
    cells = {}
    for name, texts in zip(TEXT_COLUMNS, columns, strict=True):
        if isinstance(texts, str) or not hasattr(texts, "__len__") or not len(texts) == len(columns[0]) > 0:
            raise UserError(f"{name}: expected a list with as many texts as the other lists, not {shown(texts)}.")
        cells[name] = [list(text) if isinstance(text, (list, tuple)) else [text] for text in texts]
        if wrong := [turn for turns in cells[name] for turn in turns if not isinstance(turn, (str, type(None)))]:
            raise UserError(f"{name}: expected texts (of a conversation: lists of texts), not {shown(wrong[0])}.")
    ids = {ID: [str(number) for number in range(len(columns[0]))]}
    return parse_rows("predict_proba", ids | cells, labelled=False)
