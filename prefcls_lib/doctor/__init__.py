"""Can this machine do the job? `checks` asks, `capacity` computes memory and time from a configuration.

Open `checks` first.
"""
