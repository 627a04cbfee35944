"""The instruction sets this machine runs, for tests that every path of csrc/ must pass alike."""

import os

import numpy as np
import pytest

from pr1.matcher import settings


def available():
    names = []
    for name in ("scalar", "avx2", "avx512"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PR1_ISA", name)
            try:
                names.append(settings()[0])
            except ValueError:
                continue
    return names


ISAS = available()


def on_every_isa(function, *arguments):
    """The result, a tuple of arrays, after checking that each instruction set gives the same to the last bit."""
    results = []
    before = os.environ.get("PR1_ISA")
    try:
        for name in ISAS:
            os.environ["PR1_ISA"] = name
            results.append(function(*arguments))
    finally:
        os.environ.pop("PR1_ISA", None) if before is None else os.environ.update(PR1_ISA=before)
    for name, result in zip(ISAS[1:], results[1:], strict=True):
        for ours, theirs in zip(result, results[0], strict=True):
            assert np.array_equal(ours, theirs), f"{name} differs from {ISAS[0]}"
    return results[0]
