"""Run folders to a report: `build` puts `tables`, figures and what the studies measured into the `page`.

Open `build` first.
"""
