"""Plain models on the folds of the networks: what a network starts from and is compared with.

Open `estimators` first (one class for each kind of model; `columns` is what they read of rows, `logistic` and `trees`
fit them), then `out_of_fold`, which makes one of them the starting point of a network.
"""
