"""Fixtures of the tests of the CUDA kernels."""

import pytest
import torch

import l0kernels as l0
from l0kernels import _registry


@pytest.fixture
def poison():
    """Unwritten memory reads as NaN or as the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def public(monkeypatch):
    """The public functions use the kernels, for the emulator's tensors on the CPU as well."""
    monkeypatch.setattr(_registry, "_why_not_serving", lambda *_: None)
    with l0.use_backend("cuda"):
        yield


@pytest.fixture
def served(monkeypatch):
    """Backend "cuda" by its name, on the emulator as on a GPU; what it does not serve is refused."""
    real = _registry._why_not_serving
    where = torch.device("cuda", 0)
    monkeypatch.setattr(_registry, "_why_not_serving", lambda name, _, *what: real(name, where, *what))
