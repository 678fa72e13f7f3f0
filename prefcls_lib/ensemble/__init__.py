"""Several finished runs: read and compared (`finished`), blended (`blend`), loaded as one object (`predictor`), submitted
together (`submit`).

Open `blend` first.
"""
