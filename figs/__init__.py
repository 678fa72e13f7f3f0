"""Figures of the report, drawn by code: `make figs` writes each as SVG and PNG into this folder.

`draw` is the one visual language; every other module draws with it and returns a `draw.Canvas`. Numbers in labels come
from prefcls_lib, and tests/test_figs.py holds the formulas to the code that runs.
"""
