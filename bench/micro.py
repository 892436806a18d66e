"""Times the primitives, our backends side by side, and appends the rows to bench/results/<device>.csv.
Each is compared with backend "torch" in fp64 before it is timed. The product stands beside cuBLAS and
everything that only moves bytes beside a plain copy. `table.py --micro` renders the rows."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import cli
import torch
from check import SEED, context, relative_error
from measure import Step, Timed, captured, clock_of, interleave
from ops import trained_log_alpha, usable_backend
from rows import Row, append, common_fields, results_of
from torch import Tensor

import l0kernels as l0
from l0kernels import _registry, impl
from l0kernels._calls import GateGrads

BACKENDS = ("torch", "cpp", "triton", "cuda")
GROUP_S = 0.6
QUICK_S = 0.01
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Relative, Frobenius; the second also of products with another order of summation."""
DIST = l0.HardConcrete()
LENET = (784, 300, 100, 10)
_CUDA_PRIMITIVE = {"penalty": "l0_penalty", "small_linear": "gated_linear", "small_chain": "gated_mlp"}


class Part(NamedTuple):
    """Steps to compare at one shape; flops and bytes of each step, what must be done and moved."""

    op: str
    shape: str
    dtype: torch.dtype
    keep: float
    steps: Mapping[str, Step]
    flops: float = 0.0
    bytes: float = 0.0
    values: Callable[[str | None], Sequence[Tensor]] | None = None  # results of a backend; None: the truth
    pass_: str = "fwd"


def default_of(op: str, names: Sequence[str]) -> str:
    """Which of these backends serves primitive `op` unless one is asked for."""
    primitive = op.partition("pack_")[0] + "pack" if "pack_" in op else _CUDA_PRIMITIVE.get(op, op)
    order = ["triton", "cpp"]
    if primitive in _registry.CUDA_FIRST:
        order.insert(0, "cuda")
    return next((name for name in order if name in names), names[0] if names else "")


def _ignoring(call: Callable[[], object]) -> Step:
    def step(_: int) -> None:
        call()

    return step


def _backends(device: torch.device, primitive: str) -> list[str]:
    """Those that serve a primitive on a device without waiting for it."""
    kinds = ("triton", "cuda") if device.type == "cuda" else ("torch", "cpp")
    return [name for name in kinds if usable_backend(name) and primitive in _registry.implements(name)]


def _packing(name: str) -> Any:
    """The module with pack and unpack of a backend."""
    return import_module("l0kernels.triton_kernels.pack") if name == "triton" else impl.module(name)


def _doubled(gate: list[Tensor] | None) -> list[Tensor] | None:
    return None if gate is None else [gate[0].double(), *gate[1:]]


def _sets(device: torch.device, size: int) -> int:
    """How many copies of a working set of `size` bytes are rotated, so that a GPU's L2 cache is no help."""
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
    n = 1 << 10 if quick else 1 << 28 if device.type == "cuda" else 1 << 25
    a = torch.randn(n, device=device)
    b = torch.empty_like(a)
    yield Part("copy", str(n), a.dtype, 1.0, {"copy": _ignoring(partial(b.copy_, a))}, bytes=8.0 * n)


def products(device: torch.device, quick: bool) -> Iterator[Part]:
    """Triton's product at full extent, natural and with one packed dimension, beside cuBLAS."""
    if "triton" not in _backends(device, "gated_linear"):
        return
    mm = import_module("l0kernels.triton_kernels.matmul")
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
            error = relative_error(value, truth.double())
            if not error <= TOLERANCE[torch.bfloat16]:
                raise RuntimeError(f"{name} {layout} {M}x{N}x{K}: differs from cuBLAS by {error:.1e}")
        flops = 2.0 * M * N * K
        shape = f"{M}x{N}x{K}"
        steps: dict[str, Step] = {
            "cublas": _ignoring(partial(torch.mm, left, right, out=c)),
            "natural": _ignoring(ours),
            f"packed_{side}": _ignoring(of_packed),
        }
        yield Part(f"matmul_{layout}", shape, a.dtype, 1.0, steps, flops)


def packs(device: torch.device, quick: bool) -> Iterator[Part]:
    """Compress and scatter, without and with the gates' gradient."""
    on_gpu = device.type == "cuda"
    R, C = (256, 384) if quick else (14336, 4096) if on_gpu else (4096, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    names = _backends(device, "pack")
    for side, (n_rows, n_cols) in (("rows", (R, C)), ("cols", (C, R))):
        for keep in (0.5, 0.1):
            size = float(dtype.itemsize * n_rows * n_cols)
            full = [
                torch.randn(n_rows, n_cols, device=device).to(dtype) for _ in range(_sets(device, int(size)))
            ]
            gate = _gate(n_rows if side == "rows" else n_cols, keep, device)
            gates = {side: gate, "cols" if side == "rows" else "rows": None}
            n_open = int(gate[2][0])
            kept = (slice(n_open), slice(None)) if side == "rows" else (slice(None), slice(n_open))

            def pack(
                name: str | None, i: int, full: Any = full, gates: Any = gates, dtype: Any = dtype
            ) -> Tensor:
                a, g = full[i % len(full)], gates
                if name is None:
                    a, g, dtype = a.double(), {s: _doubled(gates[s]) for s in gates}, torch.float64
                return _packing(name or "torch").pack(a, g["rows"], g["cols"], dtype)

            packed = {name: [pack(name, i) for i in range(len(full))] for name in [*names, None]}

            def unpack(
                name: str | None,
                i: int,
                dz: bool = False,
                full: Any = full,
                packed: Any = packed,
                gates: Any = gates,
                dtype: Any = dtype,
            ) -> Sequence[Tensor]:
                a, p, g = full[i % len(full)], packed[name][i % len(full)], gates
                if name is None:
                    a, g, dtype = a.double(), {s: _doubled(gates[s]) for s in gates}, torch.float64
                sides = [s for s in ("rows", "cols") if dz and g[s] is not None]
                scales = {f"scale_{s}": True for s in sides}
                grads = GateGrads(a if dz else None, "rows" in sides, "cols" in sides)
                module = _packing(name or "torch")
                out = module.unpack(p, a.shape, g["rows"], g["cols"], dtype, grads=grads, **scales)
                return [t for t in out if t is not None]

            def packed_values(name: str | None, pack: Any = pack, kept: Any = kept, C: int = n_cols) -> Any:
                return [pack(name, 0)[kept][:, :C]]

            shape = f"{n_rows}x{n_cols}"
            read = keep * size if side == "rows" else size  # whole lines are read where columns are picked
            some = partial(Part, shape=shape, dtype=dtype, keep=keep)
            yield some(
                f"pack_{side}",
                steps={name: partial(pack, name) for name in names},
                bytes=read + keep * size,
                values=packed_values,
            )
            yield some(
                f"unpack_{side}",
                steps={name: partial(unpack, name) for name in names},
                bytes=(1 + keep) * size,
                values=partial(unpack, i=0),
            )
            yield some(
                f"unpack_{side}_dz",
                steps={name: partial(unpack, name, dz=True) for name in names},
                bytes=(1 + keep) * size + read,
                values=partial(unpack, i=0, dz=True),
            )


def gates(device: torch.device, quick: bool) -> Iterator[Part]:
    """One call for all gate vectors of a model: draw, gradient of log_alpha, penalty; L2 of a weight."""
    seed = torch.tensor([1], device=device)
    models = ((300, 200),) if quick else ((784,), LENET[:-1], (14336,), (14336,) * 32)
    for sizes in models[: None if device.type == "cuda" else 3]:
        generator = torch.Generator().manual_seed(3)
        log_alphas = [trained_log_alpha(n, 0.5, generator).to(device) for n in sizes]
        weights = [1.0] * len(sizes)
        dz = torch.randn(sum(sizes), generator=generator).to(device)
        z = torch.cat([g.z for g in l0.sample_gates(log_alphas, seed=seed)])

        def inputs(name: str | None, *tensors: Tensor) -> list[Tensor]:
            return [t.double() for t in tensors] if name is None else list(tensors)

        def draw(name: str | None, i: int = 0, log_alphas: Any = log_alphas) -> Any:
            return impl.module(name or "torch").sample(inputs(name, *log_alphas), seed, 0, DIST)[::2]

        def gradient(name: str | None, i: int = 0, dz: Tensor = dz, z: Tensor = z) -> Any:
            return [impl.module(name or "torch").gate_grad(*inputs(name, dz, z), DIST)]

        def penalise(name: str | None, i: int = 0, log_alphas: Any = log_alphas, w: Any = weights) -> Any:
            return impl.module(name or "torch").l0_penalty(inputs(name, *log_alphas), w, DIST)

        def drawn(name: str | None, draw: Any = draw) -> Any:
            z, count = draw(name)
            return [z, count[::2]]

        shape = f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))
        some = partial(Part, shape=shape, dtype=torch.float32, keep=0.5)
        total = sum(sizes)
        for op, call, primitive, moved, values in (
            ("sample", draw, "sample", 12.0, drawn),
            ("gate_grad", gradient, "gate_grad", 12.0, gradient),
            ("penalty", penalise, "l0_penalty", 8.0, penalise),
        ):
            steps = {name: partial(call, name) for name in _backends(device, primitive)}
            yield some(op, steps=steps, bytes=moved * total, values=values)
    yield from _l2(device, quick)


def _l2(device: torch.device, quick: bool) -> Iterator[Part]:
    """The L2 norm coupled to gates on both sides of a weight, forward and backward; the public function."""
    n_out, n_in = (60, 40) if quick else (14336, 4096) if device.type == "cuda" else (1024, 1024)
    weight = torch.randn(n_out, n_in, device=device).requires_grad_()
    generator = torch.Generator().manual_seed(4)
    sides = [trained_log_alpha(n, 0.5, generator).to(device).requires_grad_() for n in (n_out, n_in)]
    leaves = [weight, *sides]

    def penalise(name: str | None, i: int = 0) -> Sequence[Tensor]:
        theta, out, in_ = leaves if name else [t.detach().double().requires_grad_() for t in leaves]
        with context(name or "reference"):
            value = l0.l2_penalty(theta, 0.1, in_log_alpha=in_, out_log_alpha=out)
            return value.detach(), *torch.autograd.grad(value, (theta, out, in_))

    steps: dict[str, Step] = {name: partial(penalise, name) for name in _backends(device, "l0_penalty")}
    yield Part(
        "l2_penalty",
        f"{n_out}x{n_in}",
        torch.float32,
        0.5,
        steps,
        bytes=8.0 * weight.numel(),
        values=penalise,
        pass_="fwd+bwd",
    )


def small(device: torch.device, quick: bool) -> Iterator[Part]:
    """Small layers and chains, gates drawn inside, forward and backward, by the public functions."""
    batch, sizes = (16, (40, 24, 12)) if quick else (100, LENET)
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(b, a, generator=generator).div(a**0.5).to(device) for a, b in itertools.pairwise(sizes)
    ]
    biases = [torch.randn(n, generator=generator).to(device) for n in sizes[1:]]
    x = torch.randn(batch, sizes[0], generator=generator).to(device)
    for keep in (0.5,) if quick else (1.0, 0.5, 0.1):
        log_alphas = [trained_log_alpha(n, keep, generator).to(device) for n in sizes[:-1]]
        leaves = [t.requires_grad_() for t in (*weights, *biases, *log_alphas)]
        seed = torch.tensor([SEED], device=device)

        def both(
            name: str | None, i: int = 0, depth: int = 1, leaves: Any = leaves, seed: Any = seed
        ) -> Sequence[Tensor]:
            exact = name is None
            used = [t.detach().double().requires_grad_() for t in leaves] if exact else leaves
            n = len(weights)
            w, b, a = used[:depth], used[n : n + depth], used[2 * n : 2 * n + depth]
            data = x.double() if exact else x
            with context(name or "reference"):
                if depth == 1:
                    y = l0.l0_linear(data, w[0], b[0], in_log_alpha=a[0], seed=seed)
                else:
                    y = l0.l0_mlp(data, w, b, a, seed=seed)
                return y.detach(), *torch.autograd.grad(y.sum(), (*w, *b, *a))

        for op, depth, primitive in (
            ("small_linear", 1, "gated_linear"),
            ("small_chain", len(weights), "gated_mlp"),
        ):
            steps = {name: partial(both, name, depth=depth) for name in _backends(device, primitive)}
            shape = "x".join(map(str, (batch, *sizes[: depth + 1])))
            values = partial(both, depth=depth)
            yield Part(op, shape, torch.float32, keep, steps, values=values, pass_="fwd+bwd")


SOURCES: tuple[Callable[[torch.device, bool], Iterator[Part]], ...] = (copies, gates, packs, small, products)


def check(part: Part) -> dict[str, str]:
    """The largest relative error of each step against fp64.

    Raises:
        RuntimeError: it is above TOLERANCE.
    """
    if part.values is None:
        return {}
    truth = part.values(None)
    errors = {}
    for name in part.steps:
        found = part.values(name)
        worst = max(relative_error(value, right.double()) for value, right in zip(found, truth, strict=True))
        if not worst <= TOLERANCE[part.dtype]:
            raise RuntimeError(f"{part.op} {part.shape} {name}: differs from fp64 by {worst:.1e}")
        errors[name] = f"{worst:.1e}"
    return errors


def measure(part: Part, device: torch.device, quick: bool, log: Callable[..., None]) -> list[Row]:
    rows: list[Row] = []
    errors = check(part)
    for mode in ("eager", "graph"):
        if mode == "graph" and device.type != "cuda":
            continue
        timed = {
            name: Timed(captured(step) if mode == "graph" else step) for name, step in part.steps.items()
        }
        interleave(timed, clock_of(device, quick), QUICK_S if quick else GROUP_S)
        for name, result in timed.items():
            ms = result.quantile(0.5)
            row = {
                "op": part.op,
                "shape": part.shape,
                "dtype": str(part.dtype).removeprefix("torch."),
                "keep": f"{part.keep:g}",
                "pass": part.pass_,
                "mode": mode,
                "provider": name,
                **result.columns(device.type == "cpu"),
                "tflops": f"{part.flops / ms / 1e9:.4g}" if part.flops else "",
                "gbps": f"{part.bytes / ms / 1e6:.4g}" if part.bytes else "",
                "error": errors.get(name, ""),
            }
            log(
                f"  {part.op:14} {part.shape:18} keep {part.keep:<5g} {mode:6}{name:10}{1e3 * ms:10.2f} us "
                f"{row['tflops']:>6} TFLOP/s {row['gbps']:>6} GB/s"
            )
            rows.append(row)
    return rows


def run(
    path: Path | None,
    common: Row,
    device: torch.device,
    deadline: float,
    quick: bool,
    log: Callable[..., None],
) -> bool:
    """Measures every source; one that fails is named and the others go on. Whether none failed."""
    right = True
    for source in SOURCES:
        log(source.__name__)
        try:
            for part in source(device, quick):
                if not part.steps:
                    continue
                if time.monotonic() > deadline:
                    log(f"  {part.op} {part.shape}: dropped, time is up")
                    continue
                rows = measure(part, device, quick, log)
                if path is not None:
                    append(path, [common | row for row in rows])
        except Exception as error:  # kernels fail in their own ways; the next source may still be measured
            log(f"  {source.__name__}: stopped, {type(error).__name__}: {str(error)[:300]}")
            right = False
    return right


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, "micro.py --device cuda --budget-s 60")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--csv", type=Path, help="rows are appended to it; default bench/results/<device>.csv"
    )
    parser.add_argument("--budget-s", type=float, default=1e9, help="what is not begun by then is dropped")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, saves nothing: does it run?")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget_s
    common = common_fields(args.device)
    path = args.csv
    if path is None and not args.quick:
        path = results_of(common["device"])
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
    log = partial(print, flush=True)
    return 0 if run(path, common, torch.device(args.device), deadline, args.quick, log) else 1


if __name__ == "__main__":
    cli.run(main)
