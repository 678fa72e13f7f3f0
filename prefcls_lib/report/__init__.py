"""Run folders to a report: `build` fills the template, with `groups` of runs on the same rows and `tables` of what is
said of single runs, and makes the `page`.

Open `build` first.
"""
