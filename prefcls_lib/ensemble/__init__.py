"""Several finished runs: read and blended (`blend`), loaded (`predictor`), and submitted together (`submit`).

Open `blend` first.
"""
