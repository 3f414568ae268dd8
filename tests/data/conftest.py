"""Fixtures of the tests of data."""

import pytest

from ..fixtures.captioned_files import write_pictures


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a picture of each colour in `pictures/`."""
    return write_pictures(tmp_path)
