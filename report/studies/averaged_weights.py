"""Does the mean of the weights of the last steps of an epoch predict better than the last weights?

    python report/studies/averaged_weights.py FILE.csv --out runs/averaged --set num_folds=5 --set folds=[0,1,2,3,4]
    python report/studies/averaged_weights.py --out runs/averaged --compare

`prefcls run` trains on FILE as always. On the way the weights of the last LAST of PARTS even parts of the training are
copied, and at the end of each fold its validation rows are predicted with the last weights and with the mean of the
last 2 to LAST copies. These means change nothing in the training, so that one run gives all of them.
--compare prints each mean against the last weights, paired by row, over all folds of all runs in --out.
A fold that was stopped within its training must be made again: delete its run folder.
"""

import argparse
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from prefcls_lib.config import RunConfig
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import UserError, write_whole
from prefcls_lib.training.loop import Trainer

PARTS, LAST = 8, 4


def copy_steps(total: int) -> list[int]:
    """The steps of `total` after which the weights are copied: the ends of the last LAST of PARTS even parts."""
    return [round(total * (PARTS - LAST + 1 + part) / PARTS) for part in range(LAST)]


def mean_weights(copies: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several state dicts, tensor by tensor; integer tensors are the last one's."""
    last = copies[-1]
    return {
        name: torch.stack([copy[name] for copy in copies]).mean(0) if value.is_floating_point() else value
        for name, value in last.items()
    }


def keep_copies(folder: Path) -> None:
    """From now on every `fit` of this process copies weights, and writes `folder`/LABEL.npz at its end."""
    take_step, result = Trainer.take_step, Trainer.result

    @wraps(take_step)
    def step_and_copy(trainer: Trainer, batch: np.ndarray) -> None:
        take_step(trainer, batch)
        if trainer.state.step in copy_steps(trainer.state.total_steps):
            weights = {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}
            trainer.copies = [*getattr(trainer, "copies", []), weights]

    @wraps(result)
    def result_and_compare(trainer: Trainer) -> object:
        fitted, copies = result(trainer), getattr(trainer, "copies", [])
        if len(copies) != LAST:
            raise UserError(f"{trainer.label}: was stopped within its training. Delete its run folder and start again.")
        probs = {}
        for count in range(1, LAST + 1):
            trainer.model.load_state_dict(mean_weights(copies[-count:]))
            probs[str(count)] = trainer.predict_valid()[0]
        trainer.model.load_state_dict(copies[-1])
        folder.mkdir(parents=True, exist_ok=True)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, labels=trainer.valid.labels, **probs)

        write_whole(folder / f"{trainer.label}.npz", write)
        return fitted

    Trainer.take_step, Trainer.result = step_and_copy, result_and_compare


def read_probs(run: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels (N,), prompt groups (N,), and the probabilities (N, 3) of each mean, of a run's validated rows."""
    valid = read_table(run / "valid.csv")
    labels, groups, probs = [], [], {str(count): [] for count in range(1, LAST + 1)}
    for path in sorted((run / "averaged").glob("*.npz")):
        rows = valid[valid["fold"] == int(path.stem.removeprefix("fold"))]
        with np.load(path, allow_pickle=False) as arrays:
            if not np.array_equal(rows["label"], arrays["labels"]):
                raise UserError(f"{path}: other rows than those of {run / 'valid.csv'}. Make the run again.")
            for count in probs:
                probs[count].append(arrays[count])
        labels.append(rows["label"])
        groups.append(f"{run.name} " + rows["group"].astype(str))
    return np.concatenate(labels), np.concatenate(groups), {n: np.concatenate(parts) for n, parts in probs.items()}


def compare_weights(out: Path) -> pd.DataFrame:
    """One line a run and mean: its log loss, and the difference to the last weights; p corrected for all lines."""
    lines, found = [], []
    for run in sorted(path.parent for path in out.glob("*/averaged")):
        labels, groups, probs = read_probs(run)
        for count in list(probs)[1:]:
            found.append(compare.compare(labels, probs[count], probs["1"], groups))
            losses = {"last weights": probs["1"], "mean": probs[count]}
            lines.append({"run": run.name, "rows": len(labels), "copies": count}
                         | {name: scores.log_loss(labels, values) for name, values in losses.items()})  # fmt: skip
    return pd.DataFrame(lines).assign(difference=[c.describe() for c in compare.holm_correction(found)])


def main() -> None:
    """Train with copies, or compare what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="labelled rows in the competition's columns")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", action="store_true", help="print the comparison and stop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    arguments = parser.parse_args()
    if not arguments.compare:
        if arguments.file is None:
            parser.error("name the file of rows, or --compare")
        settings = dict(text.split("=", 1) for text in arguments.set)
        name = "+".join([arguments.file.name.split(".")[0], *arguments.set]).replace("/", "_")
        run = arguments.out / name
        keep_copies(run / "averaged")
        where = {"train": str(arguments.file), "test": "sample", "out": str(run), "backbone": "minilm"}
        steps.run(RunConfig.from_mapping({**where, **settings}, "--set"))
    print(compare_weights(arguments.out).to_string(index=False, float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
