"""How the compiler lays out the gathers of pack and unpack: what decides whether they are coalesced."""

import re

import pytest
import static
import triton
from triton.backends.compiler import GPUTarget

GATHERS = [name for name in static.variants_of("pack") if "pack_cols" in name]


def compiled(name):
    variant = static.variants_of("pack")[name]
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return triton.compile(static.source(variant), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", GATHERS)
def test_a_gather_has_its_columns_in_consecutive_lanes(name):
    constexprs = static.variants_of("pack")[name].constexprs
    kernel = compiled(name)
    ttgir, ptx = kernel.asm["ttgir"], kernel.asm["ptx"]
    tile = f"tensor<{constexprs['BLOCK_C']}x{constexprs['BLOCK_R']}x!tt.ptr<"
    layouts = set(re.findall(rf"tt\.load .*{re.escape(tile)}\w+>, (#\w+)>", ttgir))
    assert len(layouts) == 1
    definition = re.search(rf"^{layouts.pop()} = (.*)$", ttgir, re.MULTILINE)[1]
    assert "sizePerThread = [1, 1], threadsPerWarp = [32, 1]" in definition
    if constexprs["VEC"] == 8:
        assert "st.global.v4.b32" in ptx
