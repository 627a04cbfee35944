"""Shared by all tests. One thread: the matrices are small, and on a busy machine waiting threads cost more than they bring."""

import os
import sys
from pathlib import Path

import pytest
import torch

# The tests run beside other work, and their small matrices gain nothing from more threads.
torch.set_num_threads(1)

# Triton reads this when it is first imported, which is later. The interpreter runs kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# `python -m pytest` puts the repository on the path, where the folder kernels/ would pass for the PyPI package `kernels`,
# which transformers probes. The package is installed; nothing needs that entry.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
