"""The results of an experiment as a terminal table and as a self-contained HTML page."""

from lark_jax.report.content import ReportContent, terminal_report
from lark_jax.report.page import write_report

__all__ = ["ReportContent", "terminal_report", "write_report"]
