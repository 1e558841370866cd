"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Two workers on two cores, with two threads each, would wait for each other most of the time. Before anybody imports PyTorch or NumPy.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("search", deadline=None)  # nothing is timed inside a test
settings.register_profile(
    "book", settings.get_profile("search"), derandomize=True
)  # what passes here passes in CI; search with --hypothesis-profile=search
settings.load_profile("book")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, which are no part of the project: LMBOOK_DATA, or shared/data beside the checkout.

    Tests that compare with them skip where they are absent.
    """
    folder = Path(os.environ.get("LMBOOK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir(): pytest.skip("the real data sets are not here: set LMBOOK_DATA to their folder to run this test")
    return folder
