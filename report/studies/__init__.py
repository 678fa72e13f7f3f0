"""Programs that measure; each writes its numbers beside itself. Run one with `python -m report.studies.NAME`."""
