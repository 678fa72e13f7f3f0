"""Numbers about predictions: log loss with confidence intervals, comparisons, calibration, figures.

Open `metrics` first, then `calibration`; `plots` has one function for each figure.
"""
