"""Predict human preference between two LLM answers: from train.csv to submission.csv.

    train.csv
      |  data          rows, folds, structure features, token ids, batches of whole pairs
      |  baselines     plain models on the same folds: what a network starts from and is compared with
      |  models        shared encoder, symmetric head, + the baseline's log-odds -> logits, probs (N, 3)
      |  training      fit: trained weights, and a history with a line for each validation
      +- evaluation    log loss with confidence intervals, calibration, figures
      +- pipeline      one run, step by step: its folder holds config.json result.json oof.csv submission.csv model/
      +- ensemble      several finished runs: read, compared, blended, submitted

All of these use `runtime` (files, devices, Kaggle's folders) and `config` (every setting); `doctor` checks whether a
machine can do the job. Packages import in the order runtime, config, data, evaluation, baselines, models, training,
pipeline, ensemble, doctor, cli; a student's reading order is in README.md beside this file.
"""

__version__ = "0.1.0"


def load(path):
    """A finished run, one of its models, or a blend.json, as an object with `predict_proba`: see `ensemble.predictor`.

    >>> prefcls_lib.load("runs/roberta").predict_proba(["What is 2 + 3?"], ["5"], ["2 + 3 is 6."])
    """
    from prefcls_lib.ensemble import predictor  # torch is loaded only where it is needed

    return predictor.load(path)
