"""The parts of a step on a GPU: product, pack, unpack, sampler and penalty beside cuBLAS and a plain copy."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_measure import Step, Timed, captured, clock_of, interleave
from ops import trained_log_alpha
from table import GPU_FIELDS, Row, append
from torch import Tensor

import l0kernels as l0

GROUP_S = 0.6
TOLERANCE = 2e-2  # of bf16 products with another order of summation, relative, Frobenius


class Part(NamedTuple):
    """Steps to compare at one shape; flops and bytes of each step, what must be done and moved."""

    op: str
    shape: str
    dtype: torch.dtype
    keep: float
    steps: dict[str, Step]
    flops: dict[str, float]
    bytes: dict[str, float]


def _kernels(name: str) -> Any:
    return import_module(f"l0kernels.triton_kernels.{name}")


def _ignoring(call: Callable[[], object]) -> Step:
    def step(_: int) -> None:
        call()

    return step


def _sets(device: torch.device, size: int) -> int:
    """How many copies of a working set of `size` bytes are rotated, so that the L2 cache is no help."""
    return 1 if device.type != "cuda" else max(1, min(4, -(-240_000_000 // max(size, 1))))


def _gate(n: int, keep: float, device: torch.device) -> list[Tensor]:
    """A packed gate with exactly keep * n fractional gates open, spread over the dimension."""
    n_open = round(keep * n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    opened = order[:n_open].sort().values
    closed = order[n_open:].sort().values
    capacity = -(-n // 128) * 128
    index = torch.zeros(capacity, dtype=torch.int32)
    index[:n] = torch.cat([opened, closed]).to(torch.int32)
    z = torch.zeros(n)
    z[opened] = 0.5
    count = torch.tensor([n_open, -(-n_open // 128) * 128], dtype=torch.int32)
    return [t.to(device) for t in (z, index, count)]


def copies(device: torch.device, quick: bool) -> Iterator[Part]:
    """The ceiling of everything that only moves bytes."""
    n = 1 << 10 if quick else 1 << 28
    a = torch.randn(n, device=device)
    b = torch.empty_like(a)
    moved = {"copy": 8.0 * n}
    yield Part("copy", str(n), a.dtype, 1.0, {"copy": _ignoring(partial(b.copy_, a))}, {}, moved)


def products(device: torch.device, quick: bool) -> Iterator[Part]:
    """The product at full extent, natural and with one packed dimension, beside cuBLAS."""
    mm = _kernels("matmul")
    tokens, model, hidden = (256, 128, 384) if quick else (8192, 4096, 14336)
    dtype = torch.float32 if quick else torch.bfloat16
    # layout, (M, N, K), the dimension that is gated when packed
    uses = (
        ("nt", (tokens, hidden, model), "n"),
        ("nt", (tokens, model, hidden), "k"),
        ("nn", (tokens, hidden, model), "n"),
        ("nn", (tokens, model, hidden), "k"),
        ("tn", (hidden, model, tokens), "m"),
        ("tn", (model, hidden, tokens), "n"),
    )
    for layout, (M, N, K), side in uses:
        a_shape = (K, M) if layout == "tn" else (M, K)
        b_shape = (N, K) if layout == "nt" else (K, N)
        a = torch.randn(a_shape, device=device, dtype=dtype)
        b = torch.randn(b_shape, device=device, dtype=dtype)
        c, own, packed = (torch.empty(M, N, device=device, dtype=dtype) for _ in range(3))
        size = {"m": M, "n": N, "k": K}[side]
        # One tile short of full: the same work, and every operand of the gate comes from its packed buffer.
        gate = _gate(size, 1 - 128 / size, device)
        ours = partial(
            mm.matmul, layout, mm.Operand(full=a), mm.Operand(full=b), mm.Operand(full=own), M, N, K
        )
        forms = {
            "m": {"a": mm.Operand(packed=a), "b": mm.Operand(full=b), "c": mm.Operand(packed=packed)},
            "n": {"a": mm.Operand(full=a), "b": mm.Operand(packed=b), "c": mm.Operand(packed=packed)},
            "k": {"a": mm.Operand(packed=a), "b": mm.Operand(packed=b), "c": mm.Operand(full=packed)},
        }[side]
        of_packed = partial(mm.matmul, layout, **forms, M=M, N=N, K=K, **{f"{side}_gate": gate})
        left = a.t() if layout == "tn" else a
        right = b.t() if layout == "nt" else b
        torch.mm(left, right, out=c)
        ours()
        of_packed()
        rows, columns = (M - 128 if side == "m" else M), (N - 128 if side == "n" else N)
        shorter = torch.mm(left[:, : K - 128], right[: K - 128]) if side == "k" else c[:rows, :columns]
        for name, value, truth in (("natural", own, c), ("packed", packed[:rows, :columns], shorter)):
            error = ((value - truth).float().norm() / truth.float().norm()).item()
            if not error <= TOLERANCE:
                raise RuntimeError(f"{name} {layout} {M}x{N}x{K}: differs from cuBLAS by {error:.1e}")
        flops = 2.0 * M * N * K
        steps: dict[str, Step] = {
            "cublas": _ignoring(partial(torch.mm, left, right, out=c)),
            "natural": _ignoring(ours),
            f"packed_{side}": _ignoring(of_packed),
        }
        rates = {"cublas": flops, "natural": flops, f"packed_{side}": flops * (1 - 128 / size)}
        yield Part(f"matmul_{layout}", f"{M}x{N}x{K}", a.dtype, 1.0, steps, rates, {})


def packs(device: torch.device, quick: bool) -> Iterator[Part]:
    kernels = _kernels("pack")
    R, C = (256, 384) if quick else (14336, 4096)
    for side, (n_rows, n_cols) in (("rows", (R, C)), ("cols", (C, R))):
        for keep in (0.5, 0.1):
            size = 2.0 * n_rows * n_cols
            sets = _sets(device, int(size))
            full = [torch.randn(n_rows, n_cols, device=device).bfloat16() for _ in range(sets)]
            gate = _gate(n_rows if side == "rows" else n_cols, keep, device)
            gates = {side: gate, "cols" if side == "rows" else "rows": None}
            packed = [kernels.pack(a, gates["rows"], gates["cols"], a.dtype) for a in full]

            def pack(i: int, full: Any = full, gates: Any = gates) -> None:
                a = full[i % len(full)]
                kernels.pack(a, gates["rows"], gates["cols"], a.dtype)

            def unpack(
                i: int, full: Any = full, packed: Any = packed, gates: Any = gates, dz: bool = False
            ) -> None:
                a, p = full[i % len(full)], packed[i % len(full)]
                wanted = {f"dz_{side}": True for side in ("rows", "cols") if dz and gates[side] is not None}
                kernels.unpack(
                    p, a.shape, gates["rows"], gates["cols"], a.dtype, theta=a if dz else None, **wanted
                )

            shape = f"{n_rows}x{n_cols}"
            read = keep * size if side == "rows" else size  # whole lines are read where columns are picked
            steps: dict[str, Step] = {"ours": pack}
            yield Part(f"pack_{side}", shape, torch.bfloat16, keep, steps, {}, {"ours": read + keep * size})
            steps = {"ours": unpack, "ours_dz": partial(unpack, dz=True)}
            moved = {"ours": (1 + keep) * size, "ours_dz": (1 + keep) * size + read}
            yield Part(f"unpack_{side}", shape, torch.bfloat16, keep, steps, {}, moved)


def gates(device: torch.device, quick: bool) -> Iterator[Part]:
    """One call for all gate vectors of a model."""
    sampler, penalty = _kernels("sample"), _kernels("penalty")
    dist = l0.HardConcrete()
    seed = torch.tensor([1], device=device)
    for vectors, n in ((2, 300),) if quick else ((1, 784), (1, 14336), (32, 14336)):
        generator = torch.Generator().manual_seed(3)
        log_alphas = [trained_log_alpha(n, 0.5, generator).to(device) for _ in range(vectors)]

        def draw(i: int, log_alphas: Any = log_alphas) -> None:
            sampler.sample(log_alphas, seed, 0, dist)

        def penalise(i: int, log_alphas: Any = log_alphas) -> None:
            penalty.l0_penalty(log_alphas, [1.0] * len(log_alphas), dist)

        shape = f"{vectors}x{n}"
        yield Part("sample", shape, torch.float32, 0.5, {"ours": draw}, {}, {"ours": 12.0 * vectors * n})
        yield Part("penalty", shape, torch.float32, 0.5, {"ours": penalise}, {}, {"ours": 8.0 * vectors * n})


SOURCES: tuple[Callable[[torch.device, bool], Iterator[Part]], ...] = (copies, products, gates, packs)


def _measure(part: Part, device: torch.device, budget_s: float, log: Callable[..., None]) -> list[Row]:
    rows: list[Row] = []
    for mode in ("eager", "graph"):
        if mode == "graph" and device.type != "cuda":
            continue
        timed = {
            name: Timed(captured(step) if mode == "graph" else step) for name, step in part.steps.items()
        }
        interleave(timed, clock_of(device), budget_s)
        for name, result in timed.items():
            ms = result.quantile(0.5)
            row = {
                "op": part.op,
                "shape": part.shape,
                "dtype": str(part.dtype).removeprefix("torch."),
                "keep": f"{part.keep:g}",
                "pass": "fwd",
                "mode": mode,
                "provider": name,
                "ms": f"{ms:.4g}",
                "ms_p20": f"{result.quantile(0.2):.4g}",
                "ms_p80": f"{result.quantile(0.8):.4g}",
                "calls": str(len(result.ms)),
                "tflops": f"{part.flops[name] / ms / 1e9:.4g}" if name in part.flops else "",
                "gbps": f"{part.bytes[name] / ms / 1e6:.4g}" if name in part.bytes else "",
            }
            log(
                f"  {part.op:12} {part.shape:18} keep {part.keep:<5g} {mode:6}{name:10}{1e3 * ms:10.2f} us "
                f"{row['tflops']:>6} TFLOP/s {row['gbps']:>6} GB/s"
            )
            rows.append(row)
    return rows


def run(
    path: Path, common: Row, device: torch.device, deadline: float, quick: bool, log: Callable[..., None]
) -> bool:
    """Measures every source; one that fails is named and the others go on. Whether none failed."""
    right = True
    for source in SOURCES:
        log(source.__name__)
        try:
            for part in source(device, quick):
                if time.monotonic() > deadline:
                    log(f"  {part.op} {part.shape}: dropped, time is up")
                    continue
                rows = _measure(part, device, 0.01 if quick else GROUP_S, log)
                append(path, [common | row for row in rows], GPU_FIELDS)
        except Exception as error:  # kernels fail in their own ways; the next source may still be measured
            log(f"  {source.__name__}: stopped, {type(error).__name__}: {str(error)[:300]}")
            right = False
    return right
