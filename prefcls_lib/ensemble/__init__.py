"""Several finished runs: read and compared (`finished`), blended (`blend`), and submitted together (`submit`).

Open `blend` first.
"""
