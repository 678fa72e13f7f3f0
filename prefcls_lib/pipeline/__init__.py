"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, `folder` is
the run folder, `prepared` what networks read of the rows, `fold_baseline` what they start from; `preview` says what
will be trained, `folds` trains one network, `launch` starts a process for each GPU, `results` scores a run, `card`
writes its model card, `predict` predicts with finished runs.
"""
