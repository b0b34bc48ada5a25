"""Studies: grids of training runs with the same backbone and budget, their records, and the report on them."""

from idattn.study.grid import Cell, Study, grid, read_records, record_file, versions
from idattn.study.report import write_report

__all__ = ["Cell", "Study", "grid", "read_records", "record_file", "versions", "write_report"]
