import pytest
import tokmerge
from conftest import build
from tokmerge.channel.device import payloads
from tokmerge.channel.segmentation import protected_means
from tokmerge.channel.server import Responder


@pytest.fixture
def merged():
    return tokmerge.patch(build(), tokmerge.Threshold(0.6), precision="int8", split_layer=2)


@pytest.fixture
def responder(merged, images):
    return Responder(merged, protected_means(merged.edge(images), 1))


@pytest.fixture
def sent(merged, images):
    return payloads(merged, images)
