"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, `folder` is
the run folder, `offsets` are the baselines that the networks start from, `folds` trains one network, `launch` starts a
process for each GPU, `predict` predicts with the models of finished runs, `results` scores a run, `ladder` runs the
baselines, `preview` shows what a notebook shows before training.
"""
