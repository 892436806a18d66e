"""The correctness gate: nothing is timed before its output and all its gradients agree with fp64."""

import torch
from registry import Case
from torch import Tensor

import l0kernels as l0

SEED = 20_260
SLACK = 4.0  # times the error of the plain fp32 formula: another order of summation, another product


def relative_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|; 0 where both are zero, NaN if either holds one."""
    difference = (value.double() - truth).abs().max().item() if truth.numel() else 0.0
    return difference / max(truth.abs().max().item(), 1e-30) if difference else difference


def check(case: Case, exact: Case, label: str) -> None:
    """Compare every timed provider of `case` with its truth in `exact`, the same case in fp64.

    Raises:
        RuntimeError: a value differs from fp64 by more than SLACK times what the same formula in fp32 does.
    """
    truths: dict[str, list[Tensor]] = {}
    bounds: dict[str, list[float]] = {}
    eps = torch.finfo(torch.float32).eps
    for name, provider in case.providers.items():
        if not provider.timed:
            continue
        truth = provider.truth
        if truth not in truths:
            truths[truth] = exact.values(exact.providers[truth], SEED)
            eager = case.values(case.providers[truth], SEED)
            bounds[truth] = [
                SLACK * max(relative_error(e, t), eps) for e, t in zip(eager, truths[truth], strict=True)
            ]
        with l0.use_backend(provider.backend or "torch"):
            values = case.values(provider, SEED)
        for i, (value, right, bound) in enumerate(zip(values, truths[truth], bounds[truth], strict=True)):
            error = relative_error(value, right)
            if not error <= bound:  # also when it is NaN
                what = "the output" if i == 0 else f"gradient {i - 1} of shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"{label}, provider {name}: {what} differs from fp64 by {error:.1e}, allowed {bound:.1e}"
                )
