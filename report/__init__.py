"""The report: `build` fills the template report.md; `read_runs` reads, `tables` compares, `page` sets the page."""
