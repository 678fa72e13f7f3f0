"""Run folders to a report: `build` puts `tables`, figures and the `specification` of the backbones into the `page`.

Open `build` first.
"""
