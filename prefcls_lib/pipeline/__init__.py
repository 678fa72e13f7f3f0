"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, `folder` is
the run folder, `offsets` fits the baseline that a network starts from, `folds` trains one model, `launch` starts a
process for each GPU, `predict` predicts with finished runs, `results` scores a run, `ladder` runs the baselines.
"""
