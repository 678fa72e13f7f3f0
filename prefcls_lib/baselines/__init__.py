"""Plain models on the folds of the networks: what a network starts from and must beat.

Open `estimators` first (the models; `columns` is what they read of rows, `logistic` and `trees` fit them), then
`cross_validation`. `offset` makes one of them the starting point of a network.
"""
