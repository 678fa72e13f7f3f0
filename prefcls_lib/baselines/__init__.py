"""Plain models on the folds of the networks: what a network must beat.

Open `estimators` first (the models), then `cross_validation`; `trees` has the boosted trees of one of them.
"""
