"""Predict human preference between two LLM answers: from train.csv to submission.csv, one room a step.

    train.csv
      |  data.read_rows, data.assign_folds     id, prompt, response_a, response_b (lists of turns), label, group, fold
      |  features.compute_features             what the shape of the answers says; SIGNS makes a swap exact
      |  tokenization.encode_rows              token ids per side, within a token budget
      |  batching                              steps of whole pairs, cut into length-sorted chunks of token ids
      |  model.PreferenceModel                 shared encoder -> u, v (B, H) -> fusion -> symmetric head -> (B, 3)
      |  train.fit, step                       best weights and the history of how it got there
      |  predict.predict_proba                 probs (N, 3) in schema.LABEL_COLUMNS order
      +- rungs, baselines                      the ladder: plain models on the same folds
      +- metrics / calibration                 log loss with intervals, slices, temperature
      +- submission.write_submission           submission.csv, read back and checked
      +- runs.RunFolder                        config.json result.json history.csv oof.csv valid.csv model/

`pipeline` (networks) and `ladder` (baselines) call them in this order, for the command line (`cli`) and the notebooks
alike; `blend` weighs finished runs, and `ensemble` predicts with all of them within a time budget (what is submitted to
Kaggle). `report` makes a page of finished runs: it reads and compares them (`finished`), sets `tables`, computes the
`specification` of the backbones, and writes the `page`. Before all of it `doctor` tells whether a `machine` can do the
job. Beside the flow stand `config` (every setting), `job` (inputs found and checked, folder claimed, scores),
`environment` (the only room that knows Kaggle), `backbones` (a name to a checked folder, one recipe each), `members`
(one model a fold and seed, trained and saved), `processes` (a subprocess for each GPU), `distributed` (several
processes on one model), `reward` (a reward model to start from), `optim` and `schedule` (rates and plan), `collapse`
(is the encoder dead?), `checkpoint` (a model on disk), `resume` (a killed run goes on), `plots` (data to figures),
`progress`, `files` (written whole or not at all) and `schema` (names).
"""

__version__ = "0.1.0"
