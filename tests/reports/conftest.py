"""Data that several files of reports use."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Return the path of a CSV with 60 rows of two classes, which their two numbers determine."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "table.csv"
    x = rng.normal(size=(60, 2)).round(3)
    pl.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": np.where(x.sum(1) > 0, "up", "down")}).write_csv(path)
    return path
