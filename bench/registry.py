"""What is measured: works (an op at a shape, with targets), who computes them, and how far each is swept.

A new op is a function ``(shape, dtype, device, exact) -> Case`` in ops.py, its name in OPS there, its cost in
cost.py and its rows in WORKS here; a new provider is an entry of PROVIDERS and one in `Case.providers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

Keep = float | tuple[int, ...]
"""The expected share of open gates, the same in every gate vector; or the expected number in each of them."""

KEEPS: tuple[float, ...] = (1.0, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.0)
TABLE_KEEPS = (1.0, 0.9, 0.5, 0.25, 0.1)
FEW_KEEPS = (1.0, 0.5, 0.1)
"""Where those of AT_FEW_KEEPS are timed, unless a run is `--full`: most compute everything at any density."""
ORDER = (0.5, 0.1, 1.0, 0.25, 0.9, 0.75, 0.0, 0.95, 0.05)
"""What says most comes first: time may run out."""

PASSES = ("fwd", "bwd", "fwd+bwd", "step")
MODES = ("eager", "graph")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
"""tf32: float32 tensors whose products torch may round to it."""

PROVIDERS = {
    "dense": "torch.nn as installed",
    "dense_compiled": "torch.nn under torch.compile",
    "dense_epilogue": "torch.nn, forward alone, GELU in cuBLAS's epilogue (its tanh form)",
    "dense_channels_last": "torch.nn in channels last memory, x made so in each call",
    "dense_own": "the ungated op on our engine",
    "masked": "weight * z, then the dense product: the original implementation's formula",
    "masked_compiled": "the same under torch.compile",
    "index_select": "open rows and columns selected, then their product: the host waits for the count",
    "grouped_mm": "units sorted by open, then a grouped product of one group whose size the device knows",
    "torch": "l0kernels, backend torch",
    "cpp": "l0kernels, backend cpp",
    "triton": "l0kernels, backend triton",
    "cuda": "l0kernels, backend cuda",
    "nn": "written with l0kernels.nn, on the default backend",
}
DENSE = ("dense", "dense_compiled", "dense_epilogue", "dense_channels_last", "dense_own")
"""Ungated: the first is the stock ratio's, the fastest in a run the fair ratio's."""
AT_FEW_KEEPS = ("dense_compiled", "dense_epilogue", "masked", "masked_compiled", "torch")
MAY_FAIL = ("dense_compiled", "dense_epilogue", "masked_compiled", "grouped_mm")
"""What a torch or a machine may not have: named and left out, which is no failure of a run."""


def keep_name(keep: Keep) -> str:
    return "-".join(map(str, keep)) if isinstance(keep, tuple) else f"{keep:g}"


@dataclass(frozen=True)
class Work:
    """An op at a shape. `targets`: by density the ratios of times to reach, to torch.nn as installed and to
    the fastest ungated provider, None where there is none; they count for provider `ours` in `mode`."""

    op: str
    shape: tuple[int, ...]
    device: str
    title: str = ""  # in the tables; "" is not in them
    dtype: str = "float32"
    passes: tuple[str, ...] = ("fwd+bwd",)
    mode: str = "eager"
    ours: str = ""
    targets: Mapping[Keep, tuple[float | None, float | None]] = field(default_factory=dict, hash=False)
    gate_sizes: tuple[int, ...] = ()  # of the gate vectors, where densities differ between them
    full: bool = False  # only in a --full run

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def label(self) -> str:
        return f"{self.op} {self.shape_name} {self.dtype}"

    @property
    def main_pass(self) -> str:
        """The one of the tables."""
        return self.passes[-1]

    @property
    def own_keeps(self) -> tuple[Keep, ...]:
        """Densities beyond the sweep."""
        return tuple(keep for keep in self.targets if isinstance(keep, tuple))

    @property
    def provider(self) -> str:
        return self.ours or {"cpu": "cpp", "cuda": "triton"}[self.device]


def _targets(
    stock: Sequence[float | None], fair: Sequence[float] = (), keeps: Sequence[Keep] = TABLE_KEEPS
) -> dict[Keep, tuple[float | None, float | None]]:
    fairs: Sequence[float | None] = fair or [None] * len(stock)
    return dict(zip(keeps, zip(stock, fairs, strict=True), strict=True))


LENET = (100, 784, 300, 100, 10)
LENET5 = (100, 1, 28, 28)
IMAGES = (16, 3, 64, 64)
TOKENS = (64, 256, 1024, 4096, 16384)  # M of the sweep over a 4096-square linear layer
STEP = ("step",)

WORKS = (
    Work(
        "linear",
        (512, 4096, 4096),
        "cpu",
        "linear 512 x 4096 x 4096",
        targets=_targets((0.56, 0.49, 0.27, 0.14, 0.08), (1.03, 0.97, 0.54, 0.29, 0.15)),
    ),
    Work(
        "linear",
        (256, 1024, 1024),
        "cpu",
        "linear 256 x 1024 x 1024",
        targets=_targets((0.55, 0.48, 0.30, 0.19, 0.10), (1.05, 1.00, 0.60, 0.35, 0.19)),
    ),
    Work(
        "linear",
        (100, 784, 300),
        "cpu",
        "linear 100 x 784 x 300",
        targets=_targets((0.58, 0.55, 0.36, 0.25, 0.17), (1.10, 1.05, 0.70, 0.48, 0.33)),
    ),
    Work(
        "ffn",
        (512, 1024, 4096),
        "cpu",
        "feed-forward 512 x 1024 x 4096, GELU",
        targets=_targets((0.56, 0.49, 0.27, 0.15, 0.075), (1.05, 0.98, 0.53, 0.29, 0.14)),
    ),
    Work(
        "chain",
        LENET,
        "cpu",
        "whole step, 784-300-100-10, batch 100",
        passes=STEP,
        targets=_targets((0.70, 0.65, 0.45, 0.37, 0.33), (1.05, 1.00, 0.65, 0.52, 0.45)),
    ),
    Work(
        "lenet5",
        LENET5,
        "cpu",
        "whole step, LeNet-5-Caffe, batch 100",
        passes=STEP,
        targets=_targets((1.1, 0.35), keeps=(1.0, (9, 18, 65, 25))),
        gate_sizes=(20, 50, 800, 500),
    ),
    Work(
        "block",
        (16, 160, 32, 32),
        "cpu",
        "WRN-28-10 block, 160 channels, batch 16",
        targets=_targets((1.1, 0.65, 0.40), keeps=(1.0, 0.5, 0.25)),
    ),
    Work(
        "resnet18",
        IMAGES,
        "cpu",
        "ResNet-18, whole step, 16 x 3 x 64 x 64",
        passes=STEP,
        ours="nn",
        targets=_targets((1.05, 0.93, 0.60, 0.35, 0.22)),
    ),
    Work(
        "mobilenet_v2",
        IMAGES,
        "cpu",
        "MobileNetV2, whole step, 16 x 3 x 64 x 64",
        passes=STEP,
        ours="nn",
        targets=_targets((1.15, None, 0.80, 0.60, 0.50)),
    ),
    Work(
        "encoder",
        (8, 128, 768, 3072),
        "cpu",
        "encoder layer of BERT, 8 x 128 positions",
        passes=("fwd+bwd",),
        ours="nn",
        targets=_targets((1.06, 0.97, 0.57, 0.33, 0.20)),
    ),
    Work("conv", (100, 20, 12, 12, 50, 5), "cpu", "convolution 100 x 20 x 12 x 12, 50 of 5 x 5"),
    Work("conv", (100, 1, 28, 28, 20, 5), "cpu", full=True),
    Work("conv", (16, 160, 32, 32, 160, 3), "cpu", full=True),
    *(Work("block", (16, *size), "cpu", full=True) for size in ((320, 16, 16), (640, 8, 8))),
    *(Work("linear", (100, *sizes), "cpu", full=True) for sizes in ((300, 100), (100, 10))),
    *(Work("linear", (tokens, 4096, 4096), "cpu", full=True) for tokens in TOKENS),
    Work("ffn", (512, 768, 3072), "cpu", full=True),
    Work("swiglu", (512, 4096, 14336), "cpu", full=True),
    Work("linear", (512, 4096, 4096), "cpu", dtype="bfloat16", full=True),
    Work(
        "ffn",
        (8192, 4096, 14336),
        "cuda",
        "feed-forward 8192 x 4096 x 14336, GELU, bf16",
        "bfloat16",
        ("fwd", "fwd+bwd"),
        targets=_targets((1.00, 0.94, 0.53, 0.28, 0.13), (1.02, 0.97, 0.55, 0.29, 0.14)),
    ),
    Work(
        "linear",
        (8192, 4096, 4096),
        "cuda",
        "linear 8192 x 4096 x 4096, input gates, bf16",
        "bfloat16",
        ("fwd", "fwd+bwd"),
        targets=_targets((1.03, 1.02, 0.57, 0.31, 0.18)),
    ),
    Work(
        "chain",
        LENET,
        "cuda",
        "whole step, 784-300-100-10, batch 100",
        passes=STEP,
        mode="graph",
        ours="cuda",
        targets=_targets((1.2, 1.2, 1.1, 1.0, 1.0)),
    ),
    *(
        Work(
            "block",
            (128, *size),
            "cuda",
            f"WRN-28-10 block, {size[0]} channels, batch 128, bf16",
            "bfloat16",
            ("fwd", "fwd+bwd"),
            targets=_targets((1.05, 1.0, 0.60, 0.35, 0.25)),
        )
        for size in ((320, 16, 16), (640, 8, 8))
    ),
    Work(
        "lenet5", LENET5, "cuda", "whole step, LeNet-5-Caffe, batch 100", passes=STEP, mode="graph", ours="nn"
    ),
    Work("conv", (100, 20, 12, 12, 50, 5), "cuda", mode="graph", full=True),
    Work("conv", (128, 640, 8, 8, 640, 3), "cuda", dtype="bfloat16", full=True),
    Work("block", (128, 160, 32, 32), "cuda", dtype="bfloat16", full=True),
    Work("linear", (100, 784, 300), "cuda", mode="graph", ours="cuda", full=True),
    *(Work("linear", (tokens, 4096, 4096), "cuda", dtype="bfloat16", full=True) for tokens in TOKENS),
    *(Work("linear", (8192, 4096, 4096), "cuda", dtype=dtype, full=True) for dtype in ("float32", "tf32")),
    Work("ffn", (8192, 768, 3072), "cuda", dtype="bfloat16", full=True),
    Work("swiglu", (8192, 4096, 14336), "cuda", dtype="bfloat16", full=True),
)

NETS = {
    "resnet18": "ResNet-18, 16 images of 64 x 64",
    "mobilenet_v2": "MobileNetV2, 16 images of 64 x 64",
    "encoder": "encoder layer of BERT, 8 x 128 positions",
    "ffn": "transformer's feed-forward block",
    "lenet5": "LeNet-5-Caffe, batch 100",
    "chain": "LeNet-300-100, batch 100",
}
"""The README's table: ops and what they are called there, on every device."""

QUICK = {
    "linear": (32, 64, 48),
    "ffn": (32, 32, 64),
    "swiglu": (32, 32, 64),
    "chain": (16, 40, 24, 12, 5),
    "conv": (5, 6, 9, 9, 10, 3),
    "lenet5": (7, 1, 28, 28),
    "block": (3, 12, 7, 7),
    "resnet18": (4, 3, 16, 16, 2),
    "mobilenet_v2": (4, 3, 16, 16, 2),
    "encoder": (2, 5, 16, 24),
}
"""Tiny shapes: do they run, and are they right?"""


def chosen(
    device: str,
    op: str | None = None,
    shape: str | None = None,
    dtype: str | None = None,
    full: bool = False,
) -> list[Work]:
    """The works of a device that fit; a shape that is not listed is one more work of its op."""
    works = [w for w in WORKS if w.device == device and op in (None, w.op)]
    if shape is not None:
        listed = [w for w in works if w.shape_name == shape and dtype in (None, w.dtype)]
        if not listed and op is not None:
            passes = STEP if any(w.passes == STEP for w in works) else ("fwd+bwd",)
            sizes = tuple(int(size) for size in shape.split("x"))
            return [Work(op, sizes, device, dtype=dtype or "float32", passes=passes)]
        return listed[:1] if dtype is None else listed
    full = full or dtype not in (None, "float32")
    return [w for w in works if (full or not w.full) and dtype in (None, w.dtype)]
