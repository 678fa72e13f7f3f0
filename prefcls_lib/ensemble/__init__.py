"""Several finished runs: read (`finished`), blended (`blend`), loaded as one object (`predictor`), submitted (`submit`).

Open `blend` first.
"""
