"""Run folders to a report: `build` puts what was found into the `page`: `groups` of runs on the same rows, `tables` of
the backbones, the studies and single runs, figures.

Open `build` first.
"""
