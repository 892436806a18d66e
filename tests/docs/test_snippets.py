"""Every block of Python in README and the manual runs as printed.

The blocks of a page run top to bottom in one namespace, in an empty folder, with warnings as errors. A block
``text title="Output"`` is what the block of Python before it prints, where ``...`` stands for anything; with
``(figures vary)`` behind Output it is that but for its figures. A page with ``run: torchrun N`` at its top is
a script that N processes run together.
"""

import contextlib
import io
import os
import re
import sys
import types

import fresh
import pytest
import torch
from manual import PAGES, ROOT, blocks, meta

OUTPUT, SIMILAR = 'title="Output"', 'title="Output (figures vary)"'
TEXTS = {name: page.read_text() for name, page in PAGES.items()}
PYTHON = {name: [b for b in blocks(text) if b.language == "python"] for name, text in TEXTS.items()}


def is_script(name):
    return meta(TEXTS[name]).get("run", "").startswith("torchrun")


def pages(script):
    return [name for name in PAGES if PYTHON[name] and is_script(name) == script]


def as_pattern(output, figures_vary):
    """A regular expression for what a block shows as its output; spaces at the ends of lines do not count."""
    lines = (".*".join(map(re.escape, line.split("..."))) for line in stripped(output).split("\n"))
    pattern = "\n".join(lines)
    if figures_vary:
        pattern = re.sub(r"(\\ )+", r"\\s+", re.sub(r"\d(?:\d|,|\\\.)*", r"\\d[\\d.,]*", pattern))
    return re.compile(pattern)


def stripped(text):
    return "\n".join(line.rstrip() for line in text.strip().split("\n"))


@pytest.fixture
def untouched(tmp_path, monkeypatch, threads):
    """An empty folder, one thread and a seed; what a page sets of torch is set back."""
    monkeypatch.chdir(tmp_path)
    threads(1)
    before = torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)
    torch.set_default_dtype(before[0])
    torch.set_rng_state(before[1])


@pytest.mark.parametrize("name", pages(script=False))
def test_page(name, untouched, monkeypatch):
    # What a block defines is importable by its module's name, so that a page can pickle and inspect it.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    printed = ""
    for block in blocks(TEXTS[name]):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.source, str(PAGES[name]), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, module.__dict__)
            printed = stripped(out.getvalue())
        elif block.info in (OUTPUT, SIMILAR):
            pattern = as_pattern(block.source, block.info == SIMILAR)
            assert pattern.fullmatch(printed), f"line {block.line}: it printed\n{printed}"


# What torchrun does, but that the ranks fork from a process that has torch.
RANKS = """
import os, runpy, torch
torch.set_num_threads(1)
store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
os.environ |= dict(WORLD_SIZE="{ranks}", LOCAL_WORLD_SIZE="{ranks}", TORCHELASTIC_USE_AGENT_STORE="True")
os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(store.port))
ranks = []
for rank in range({ranks}):
    if not (child := os.fork()):
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
        runpy.run_path({script!r}, run_name="__main__")
        break
    ranks.append(child)
else:
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if status:
            [os.kill(other, 9) for other in ranks]  # they would wait for it
            raise SystemExit(1)
"""


@pytest.mark.parametrize("name", pages(script=True))
def test_script_page(name, tmp_path):
    run = meta(TEXTS[name])["run"].split()
    assert run[0] == "torchrun"
    assert not any(block.info in (OUTPUT, SIMILAR) for block in blocks(TEXTS[name])), (
        "what a script prints is not compared"
    )
    script = tmp_path / "page.py"
    strict = 'import warnings\nwarnings.filterwarnings("error", module="__main__|l0kernels")\n'
    script.write_text("\n\n".join([strict, *(block.source for block in PYTHON[name])]))
    done = fresh.run(
        RANKS.format(ranks=int(run[1]), script=str(script)), tmp_path, os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
