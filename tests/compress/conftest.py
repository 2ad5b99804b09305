"""Shared by the tests of compression: a tiny model of SD 1's build and calls of its UNet under guidance."""

import pytest
import tiny
from compress_inputs import guided_calls

from edgesd.models.load import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.folder("sd1", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def calls():
    return guided_calls()
