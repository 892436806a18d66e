"""Writes the generated tables of the manual: ``python docs/scripts/tables.py [--check]``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. What the backends serve comes from
l0kernels/_registry.py. With --check it writes nothing and fails where a page is not what it would write.
(bench/table.py writes the tables of results.)
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from l0kernels import _registry
from l0kernels.impl import cuda

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

DEVICES = {"reference": "any", "torch": "any", "cpp": "CPU", "triton": "GPU", "cuda": "GPU"}

FUNCTIONS = {
    "sample_gates": "sample",
    "l0_penalty": "l0_penalty",
    "l2_penalty": "l2_penalty",
    "l0_linear": "gated_linear",
    "gated_linear": "gated_linear",
    "l0_mlp": "gated_mlp",
    "gated_mlp": "gated_mlp",
    "masked_linear": ("masked_linear", "block_linear"),
    "gated_conv2d": "gated_conv2d",
    "packed_conv2d": "gated_conv2d",
    "pack_channels": "gated_conv2d",
    "unpack_channels": "gated_conv2d",
    "gated_batch_norm": "gated_batch_norm",
    "gated_attention": "gated_attention",
    "prox": "prox",
    "eval_gates": None,
    "gated_layer_norm": None,
    "gated_rms_norm": None,
    "gated_group_norm": None,
}
"""The primitive that a public function asks its backend for; None: it is plain torch everywhere."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def served(backend: str, primitive: str | None) -> str:
    """How a backend answers a call of a primitive."""
    if primitive is None:
        return "formula"
    if backend == "reference":
        return "formula"
    if backend == "cuda":
        return "yes" if primitive in cuda.SERVES else "error"
    return "yes" if _registry.has(backend, primitive) else "formula"


def support() -> str:
    """Which backend serves which public function."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, primitives in FUNCTIONS.items():
        several = primitives if isinstance(primitives, tuple) else (primitives,)
        (answers,) = {tuple(served(backend, p) for backend in _registry.NAMES) for p in several}
        rows.setdefault(answers, []).append(f"`{name}`")
    header = ["function", *(f"`{name}`<br>{DEVICES[name]}" for name in _registry.NAMES)]
    return table(header, ([", ".join(names), *answers] for answers, names in rows.items()))


def dtypes() -> str:
    """Which dtypes of x a backend takes."""

    def takes(backend: str, dtype: torch.dtype) -> str:
        why = _registry._why_not_serving(backend, torch.device("meta"), dtype, "gated_linear")
        return "yes" if why is None else "error"

    rows = [
        [f"`{str(dtype).removeprefix('torch.')}`", *(takes(name, dtype) for name in _registry.NAMES)]
        for dtype in DTYPES
    ]
    return table(["dtype of x", *(f"`{name}`" for name in _registry.NAMES)], rows)


def on_cuda() -> str:
    """Which backend a tensor on a GPU takes, and why."""
    return table(["primitive", "on a GPU"], ([f"`{name}`", why] for name, why in _registry.ON_CUDA.items()))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "backends.md": {"support": support, "dtypes": dtypes, "on-cuda": on_cuda},
}


def written(page: str, name: str, made: str) -> str:
    """The page with the table `name` as it is now."""
    marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if len(marked.findall(page)) != 1:
        raise ValueError(f"expected one table between <!-- table: {name} --> and <!-- end -->")
    return marked.sub(lambda found: f"{found[1]}\n{made}\n\n{found[2]}", page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a page would change")
    check = parser.parse_args(argv).check
    changed = []
    for name, tables in TABLES.items():
        file = DOCS / name
        before = page = file.read_text()
        for marker, make in tables.items():
            page = written(page, marker, make())
        if page != before:
            changed.append(name)
            if not check:
                file.write_text(page)
    if check and changed:
        print(f"not as generated: {', '.join(changed)}; run python docs/scripts/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
