"""Numbers about predictions: log loss with confidence intervals, comparisons, calibration, figures.

Open `scores` first, then `compare` (intervals and verdicts) and `calibration`; `slices` says where a model is wrong,
and `plots` has one function for each figure.
"""
