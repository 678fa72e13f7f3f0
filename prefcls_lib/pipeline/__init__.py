"""One run, from settings to a run folder.

Open `steps` first: the command line and the notebooks call its functions in order. `job` checks the inputs, and writes
token ids and baselines before training; `folder` is the run folder, `preview` says what will be trained, `folds` trains
one network, `launch` starts a process for each GPU, `results` scores a run and writes its model card, `predict`
predicts with finished runs.
"""
