"""The trained net as others take it: exported, proven equal, timed beside the dense net, saved."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import files
import torch
from torch import Tensor

import l0kernels as l0

if TYPE_CHECKING:
    from trainer import Run

ROUNDS, IMAGES = 30, 100


@torch.no_grad()
def predict(net: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(part) for part in x.split(500)])


@contextmanager
def without_tf32() -> Iterator[None]:
    """cuDNN's convolutions in float32 as written: torch lets them round what they multiply to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def ship(run: "Run", path: Path) -> str:
    """Saves the open part of the gated net as a torch.export program, which loads without l0kernels.

    Returns:
        What was saved, how much smaller it is than the dense net, and how much faster.

    Raises:
        RuntimeError: what was saved computes other outputs than the gated net in eval(); nothing is written.
        OSError: the file cannot be written; the message says where the net is instead.
    """
    model, x = run.gated.model.eval(), run.data.test_x
    small = l0.nn.export(model)
    batch = torch.export.Dim("batch")
    program = torch.export.export(small.cpu(), (x[:2].cpu(),), dynamic_shapes=({0: batch},))
    content = io.BytesIO()
    torch.export.save(program, content)
    content.seek(0)
    # Proven is what a reader of the file gets, not what was meant to be in it.
    loaded = torch.export.load(content).module()
    with without_tf32():
        difference = prove(predict(loaded, x.cpu()), predict(model, x).cpu())
    files.write_somewhere(path, content.getbuffer())

    dense = run.example.dense().to(run.device).eval()
    kept, of = (sum(p.numel() for p in net.parameters()) for net in (small, dense))
    ours, theirs = inference_ms(small.to(run.device), dense, x[:IMAGES])
    own = sorted({type(m).__name__ for m in small.modules() if type(m).__module__.startswith("l0kernels")})
    pickle = (
        f"torch.save(export(model)) would need l0kernels to load, for {', '.join(own)}"
        if own
        else "export(model) is of torch.nn alone"
    )
    return "\n".join(
        (
            f"Export: {kept:,} of {of:,} parameters are left, {of / max(kept, 1):.1f} times fewer; its "
            f"outputs for all {len(x):,} test images are those of the gated net, within {difference:.1e}.",
            f"Inference of {len(x[:IMAGES])} images takes {ours:.2f} ms, of the dense net {theirs:.2f} ms: "
            f"{theirs / ours:.1f} times as fast.",
            f"torch.export.load({str(path)!r}).module() runs it without l0kernels; {pickle}.",
        )
    )


def prove(got: Tensor, wanted: Tensor) -> float:
    """The largest difference.

    Raises:
        RuntimeError: it is more than another order of summation explains, or a prediction differs.
    """
    # Sums of some thousand terms stay far within 1e-4 of the largest output.
    difference, tolerance = (got - wanted).abs().max().item(), 1e-4 * max(1.0, wanted.abs().max().item())
    changed = int((got.argmax(1) != wanted.argmax(1)).sum())
    if not difference <= tolerance or changed:
        raise RuntimeError(
            f"export: expected the gated net's outputs within {tolerance:.1e} and its predictions, "
            f"got a difference of {difference:.1e} and {changed} other predictions"
        )
    return difference


@torch.inference_mode()
def inference_ms(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor) -> tuple[float, float]:
    """The median times of a forward of each net, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for net, found in zip((ours, theirs), times, strict=True):
            net(x)  # its weights are in the caches
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            begin = time.perf_counter()
            net(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            found.append(1e3 * (time.perf_counter() - begin))
    return median(times[0]), median(times[1])
