"""Figures of the report, drawn by code: `make figs` writes each as SVG and PNG into this folder.

`draw` has boxes, arrows and colours; every other module draws with them and returns a `draw.Canvas`. Numbers in labels
come from prefcls_lib, and tests/test_figs.py compares the formulas with the code.
"""
