import pytest
import tokmerge
from conftest import build


@pytest.fixture
def merged():
    return tokmerge.patch(build(), tokmerge.Threshold(0.6), precision="int8", split_layer=2)
