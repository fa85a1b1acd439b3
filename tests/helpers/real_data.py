"""Files of published data sets: a few rows of each are shipped, the whole files are optional."""

from pathlib import Path

import pytest

SMALL = Path(__file__).resolve().parents[1] / "files"
LARGE = Path(__file__).resolve().parents[3] / "shared" / "data"

# The whole files take minutes; the shipped rows test the same in seconds.
ON_LARGE = [
    pytest.mark.skipif(
        not LARGE.is_dir(), reason="the whole data sets in ../shared/data are not on this machine"
    ),
    pytest.mark.long,
]


def needs_large(test):
    "A test of whole files: one for `make test-long`, where they are."
    for mark in ON_LARGE:
        test = mark(test)
    return test


# A test with the argument `folder` runs on the shipped rows always, on the whole files in
# `make test-long`, where they are.
on_real_rows = pytest.mark.parametrize(
    "folder",
    [pytest.param(SMALL, id="few"), pytest.param(LARGE, id="all", marks=ON_LARGE)],
)


def on_real_files(
    columns: str,  # the other arguments of the test, "name, rows"; the first one names the file
    small: list,  # their values for the shipped files
    large: list,  # and for the whole files
):
    "The test runs on each shipped file always, on each whole file where they are."
    few = [pytest.param(SMALL, *row, id=f"few-{row[0]}") for row in small]
    whole = [pytest.param(LARGE, *row, id=f"all-{row[0]}", marks=ON_LARGE) for row in large]
    return pytest.mark.parametrize(f"folder, {columns}", few + whole)
