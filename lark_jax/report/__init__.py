"""The results of an experiment as a terminal table and as a self-contained HTML page."""

from lark_jax.report.content import ReportContent
from lark_jax.report.page import write_report
from lark_jax.report.table import terminal_report

__all__ = ["ReportContent", "terminal_report", "write_report"]
