"""Draws the manual's pictures into docs/assets: ``python docs/scripts/pictures.py [--check]``.

They have no background, and colours that are legible on white and on black. With --check it writes nothing
and fails where a file is not what it would write.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import l0kernels as l0

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
TEXT, LINE, OPEN, PART, SHUT = "#7b8794", "#8c96a1", "#2f8fd0", "#e08a1e", "#8c96a1"
GATES = 16
EXAMPLES = {-3.0: "mostly closed", 0.0: "undecided", 3.0: "mostly open"}


def text(x: float, y: float, words: str, *, size: int = 14, anchor: str = "middle", fill: str = TEXT) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> str:
    style = f'fill="{fill}" fill-opacity="{opacity:g}" stroke="{LINE}" stroke-width="1"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {style}/>'


def path(points: Sequence[tuple[float, float]], stroke: str, width: float = 2) -> str:
    along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{along}" fill="none" stroke="{stroke}" stroke-width="{width:g}"/>'


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>", ""])


def short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def distribution() -> str:
    """How often a gate takes each value, for three of its parameters."""
    dist = l0.HardConcrete()
    parts = []
    width, bottom, height = 250, 190, 130
    for i, (log_alpha, name) in enumerate(EXAMPLES.items()):
        left = 40 + i * width
        right = left + 170
        a, shown = torch.tensor(log_alpha, dtype=torch.float64), f"{log_alpha:+g}" if log_alpha else "0"
        shut, full = 1 - dist.p_open(a).item(), dist.p_one(a).item()
        parts.append(text((left + right) / 2, 26, f"log α = {shown}: {name}", size=15))
        parts.append(path([(left - 14, bottom), (right + 14, bottom)], LINE, 1))
        for at, share, fill in ((left, shut, SHUT), (right, full, OPEN)):
            parts.append(box(at - 9, bottom - height * share, 18, height * share, fill, 0.85))
            parts.append(text(at, bottom - height * share - 7, short(share)))
        # Between them the density, of a variable whose distribution is sigmoid(beta * logit(s) - log_alpha).
        points = []
        for z in (k / 60 for k in range(61)):
            s = (z - dist.gamma) / (dist.zeta - dist.gamma)
            inner = dist.beta * (math.log(s) - math.log(1 - s)) - log_alpha
            cdf = 1 / (1 + math.exp(-inner))
            density = dist.beta * cdf * (1 - cdf) / (s * (1 - s)) / (dist.zeta - dist.gamma)
            points.append((left + (right - left) * z, bottom - height * density * 0.5))
        parts.append(path(points, PART))
        for at, label in ((left, "0"), (right, "1")):
            parts.append(text(at, bottom + 20, label))
        parts.append(text((left + right) / 2, bottom + 20, "z"))
    bars = "bars: the share of draws that are exactly 0 or exactly 1"
    parts.append(text(400, 238, f"{bars}; line: the density between, in a scale of its own"))
    return picture(800, 250, "The hard-concrete distribution at three parameters", parts)


def gate_vector() -> str:
    """One draw of a vector of gates, and what a layer that reads its inputs through them multiplies."""
    order = torch.tensor([(7 * k) % GATES for k in range(GATES)])
    log_alpha = torch.linspace(-5, 3, GATES)[order]
    z = l0.reference.sample_gates(log_alpha, seed=torch.tensor([4])).z.tolist()
    cell, rows, left, top = 24, 6, 60, 60
    parts = [text(left, 28, f"one draw of {GATES} gates, one for each input", anchor="start", size=15)]
    kept = [k for k in range(GATES) if z[k]]
    packed = left + GATES * cell + 120

    def column(x: float, value: float, label: str) -> None:
        fill, opacity = (OPEN, 0.9) if value == 1 else (PART, 0.9)
        if not value:
            fill, opacity = "none", 0
        parts.append(box(x, top, cell, cell, fill, opacity))
        parts.append(text(x + cell / 2, top + 16, label, size=11, fill="#ffffff" if value else TEXT))
        for row in range(rows):
            parts.append(box(x, top + 40 + row * cell, cell, cell, fill, opacity * 0.55))

    def named(value: float) -> str:
        return f"{value:g}" if value in (0, 1) else short(value)

    for k, value in enumerate(z):
        column(left + k * cell, value, named(value))
    for at, k in enumerate(kept):
        column(packed + at * cell, z[k], named(z[k]))
    middle, low = top + 40 + rows * cell / 2, top + 40 + rows * cell
    parts.append(text(left - 14, top + 17, "z", anchor="end", size=16))
    parts.append(text(left - 14, middle + 5, "W", anchor="end", size=16))
    start, end = left + GATES * cell + 22, packed - 22
    parts.append(path([(start, middle), (end, middle)], TEXT))
    parts.append(path([(end - 9, middle - 6), (end, middle), (end - 9, middle + 6)], TEXT))
    parts.append(text((start + end) / 2, middle - 12, "pack"))
    parts.append(text(packed, 28, f"what is multiplied: {len(kept)} columns", anchor="start", size=15))
    for i, (fill, words) in enumerate(
        ((OPEN, "open, z = 1"), (PART, "open, 0 &lt; z &lt; 1"), ("none", "closed, z = 0: never read"))
    ):
        x = left + i * 170
        parts.append(box(x, low + 24, 14, 14, fill, 0.9 if fill != "none" else 0))
        parts.append(text(x + 22, low + 36, words, anchor="start"))
    return picture(packed + len(kept) * cell + 40, low + 56, "A gate vector and the columns it leaves", parts)


PICTURES = {"hard-concrete.svg": distribution, "gate-vector.svg": gate_vector}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file would change")
    check = parser.parse_args(argv).check
    changed = []
    for name, draw in PICTURES.items():
        file, drawn = ASSETS / name, draw()
        if not file.exists() or file.read_text() != drawn:
            changed.append(name)
            if not check:
                file.write_text(drawn)
    if check and changed:
        print(f"not as drawn: {', '.join(changed)}; run python docs/scripts/pictures.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
