"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, and writes
token ids and baselines before training; `folder` is the run folder, `folds` trains the networks, `launch` starts a
process for each GPU, `results` says how long a run will take, scores it and writes its model card, `predict` predicts
with finished runs.
"""
