"""``fedveil report``: one HTML page from any set of runs and audits."""

from fedveil.report.artifacts import read_artifacts
from fedveil.report.page import build_page, write_report
from fedveil.report.verdict import verdict

__all__ = ["build_page", "read_artifacts", "verdict", "write_report"]
