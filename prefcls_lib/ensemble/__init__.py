"""Several finished runs: read (`finished`), blended (`blend`), loaded (`predictor`) and submitted together (`submit`).

Open `blend` first.
"""
