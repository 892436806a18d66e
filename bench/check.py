"""The correctness gate: nothing is timed before its output and all its gradients agree with fp64."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from ops import Case, Provider
from registry import Keep
from torch import Tensor

import l0kernels as l0

SEED = 20_260
SLACK = 4.0  # times the error of the plain formula in the same dtype: another order of summation
UNDONE = 1e-12  # of the largest gradient, all that fp64 leaves of one of what a norm behind it undoes
NOISE = 1e-4  # of the largest gradient, as much as float32 may leave of it
FLOOR = 1e-6  # gradients of gates are sums that cancel, of few gates: the plain formula may have been lucky
MANY_KINKS = 100_000
"""Of so many units some lie so near a kink that float32 rounds them to its other side; each makes 1e-3."""
SANE = 0.02  # relative error of an output, whatever the dtype
EPS = {"float32": 2.0**-23, "tf32": 2.0**-11, "bfloat16": 2.0**-8}


def context(backend: str) -> AbstractContextManager[object]:
    return nullcontext() if backend == "default" else l0.use_backend(backend)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products of float32 in tf32 where that is the dtype, else in float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Frobenius norm; 0 where both are zero, NaN if either holds one."""
    difference = (value.double() - truth).norm().item()
    return difference / max(truth.norm().item(), 1e-30) if difference else difference


class Checker:
    """Compares providers with their formula in fp64, at the densities of `case`."""

    def __init__(self, case: Case, exact: Case, dtype: str) -> None:
        self.case, self.exact = case, exact
        self._eps = EPS[dtype]
        # In coarser types the plain formula flips as many.
        self._grad_floor = case.kinked if dtype == "float32" and case.kinks > MANY_KINKS else FLOOR
        self._keep: Keep = 1.0
        self._dense: tuple[list[Tensor], list[float]] | None = None
        self._truths: dict[str, tuple[list[Tensor], list[float]]] = {}
        self._own_noise: dict[str, float] = {}

    def set_keep(self, keep: Keep) -> None:
        self._truths.clear()
        self._keep = keep
        for case in (self.case, self.exact):
            case.set_keep(keep)

    def _truth(self, name: str) -> tuple[list[Tensor], list[float]]:
        if name == "dense" and self._dense is not None:
            return self._dense
        if name not in self._truths:
            self._truths.clear()  # one is large
            leaves, exact_leaves = self.case.leaves(name), self.exact.leaves(name)
            with l0.use_backend("reference"):
                truth = self.exact.values(self.exact.truths[name], exact_leaves, True, SEED)
                eager = self.case.values(self.case.truths[name], leaves, True, SEED)
            errors = [relative_error(e, t) for e, t in zip(eager, truth, strict=True)]
            if not errors[0] <= SANE:
                raise RuntimeError(f"the formula {name} itself differs from fp64 by {errors[0]:.1e}")
            bounds = [SLACK * max(error, self._eps, FLOOR) for error in errors]
            norms = [t.norm().item() for t in truth]
            largest = max(norms[1:])
            for i, norm in enumerate(norms):
                if 0 < norm < UNDONE * largest:
                    bounds[i] = max(bounds[i], NOISE * largest / norm)
            found = truth, [bounds[0], *(max(bound, self._grad_floor) for bound in bounds[1:])]
            if name == "dense":
                self._dense = found  # at every density
                return found
            self._truths[name] = found
        return self._truths[name]

    def error(self, name: str, provider: Provider) -> float:
        """The largest relative error of output and gradients.

        A provider with noise of its own is compared once, with every gate open, where noise does not matter.

        Raises:
            RuntimeError: one of them is further from fp64 than SLACK times the plain formula.
        """
        if not provider.own_noise:
            return self._error(name, provider, provider.truth)
        if name not in self._own_noise:
            self.case.set_keep(1.0)
            try:
                self._own_noise[name] = self._error(name, provider, "dense")
            finally:
                self.case.set_keep(self._keep)
        return self._own_noise[name]

    def _error(self, name: str, provider: Provider, formula: str) -> float:
        truth, bounds = self._truth(formula)
        with context(provider.backend):
            values = self.case.values(provider.forward, provider.leaves, provider.backward, SEED)
        if provider.own_noise and self.case.grad is None:
            # The loss holds the penalty of open gates, which the ungated one lacks.
            values, truth, bounds = values[1:], truth[1:], bounds[1:]
        worst = 0.0
        for i, (value, right, bound) in enumerate(zip(values, truth, bounds, strict=False)):
            error = relative_error(value, right)
            if not error <= bound:  # also when it is NaN
                what = f"value {i} (0: the output, then gradients) of shape {tuple(value.shape)}"
                raise RuntimeError(f"{name}: {what} differs from fp64 by {error:.1e}, allowed {bound:.1e}")
            if bound < 1:  # not the penalty's gradient at keep 1, or of what a norm behind it undoes
                worst = max(worst, error)
        return worst
