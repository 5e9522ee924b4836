"""The figure of the fuzzing, at the end of every test run that had some."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Inputs, refusals and faults of all targets together."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    counts = [count for report in reports for name, count in report.user_properties if name == "fuzz"]
    if counts:
        inputs, refusals, faults = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(f"fuzz: {inputs:,} inputs, {refusals:,} refused, {faults:,} faults")
