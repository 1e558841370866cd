"""What every test run of the project shares: the notebooks' rules (tests/nbval_tolerance.py), and a last word on the documents' claims."""

import pytest

pytest_plugins = ["tests.nbval_tolerance"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    "List the claims that no chapter has reached, in a run that tested them: they are to be seen, not hidden."
    reports = [r for rows in terminalreporter.stats.values() for r in rows]
    if not any(getattr(r, "nodeid", "").startswith("tests/test_claims.py") for r in reports): return
    from tests.test_claims import summary

    terminalreporter.write_sep("=", "claims")
    terminalreporter.write_line(summary())
