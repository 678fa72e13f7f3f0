"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, `folder` is
the run folder, `prepared` what networks read of the rows, `fold_baseline` what they start from; `folds` trains one
network, `launch` starts a process for each GPU, `results` scores a run, `card` writes its model card, `estimate` says
how long it will take, `predict` predicts with finished runs, `preview` is what notebooks show before training.
"""
