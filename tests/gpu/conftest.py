"""These tests run on the GPU, or where TOKMERGE_DEVICE says: on the CPU, to see that they themselves are sound."""

import os

import pytest
import torch

DEVICE = os.environ.get("TOKMERGE_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no GPU here: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def device():
    # What is compared is float32 on both.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(DEVICE)
