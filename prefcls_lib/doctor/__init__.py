"""Can this machine do the job? `checks` asks, `capacity` computes memory and disk space from a configuration.

Open `checks` first.
"""
