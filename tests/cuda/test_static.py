"""What nvcc made of the CUDA kernels, read from the built module: no GPU is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import fresh
import pytest

from l0kernels.impl import cuda


def tools():
    """A folder with cuobjdump and nvdisasm: the CUDA toolkit's or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm"):
        return Path(found).parent
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends/nvidia/bin"


def cuobjdump(*arguments, of=None, cwd=None):
    """What it prints of a file, or of the module."""
    folder = tools()
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = [str(folder / "cuobjdump"), *arguments, str(of or Path(MODULE).resolve())]
    options = {"capture_output": True, "text": True, "check": True}
    return subprocess.run(command, env=environment, cwd=cwd, **options).stdout


if cuda._CUDA is None:
    pytest.skip(str(cuda.why_not()), allow_module_level=True)
MODULE = cuda._CUDA.__file__
pytestmark = pytest.mark.xdist_group("sass")  # one worker disassembles it

KERNELS = (
    "sample_kernel",
    "gate_grad_kernel",
    "pack_kernel",
    "pack_rows_kernel",
    "unpack_kernel",
    "unpack_rows_kernel",
    "sum_kernel",
    "penalty_kernel",
    "small_kernel",
)


@pytest.fixture(scope="module")
def resources():
    """(architecture, mangled name) -> {"REG": ..., "STACK": ..., ...}."""
    table, arch, name = {}, None, None
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match[1]
        elif "REG:" in line:
            table[arch, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return table


@pytest.fixture(scope="module", params=["one", pytest.param("all", marks=pytest.mark.long)])
def code(request, tmp_path_factory):
    """(architecture, mangled name) -> SASS, for sm_90 or what there is, and for all where samplers differ."""
    folder = tmp_path_factory.mktemp("cubins")
    cuobjdump("-xelf", "all", cwd=folder)
    files = sorted(folder.iterdir())
    if request.param == "one":
        whole = ".sm_90." if any(".sm_90." in file.name for file in files) else files[0].suffixes[-2] + "."
        files = [file for file in files if whole in file.name or b"sample_kernel" in file.read_bytes()]
    table, arch, name = {}, None, None
    for line in "\n".join(cuobjdump("-sass", of=file) for file in files).splitlines():
        if match := re.match(r"code for (\S+)", line.strip()):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
            table[arch, name] = []
        elif (arch, name) in table:
            table[arch, name].append(line)
    return {key: "\n".join(lines) for key, lines in table.items()}


def test_every_kernel_for_every_architecture(resources):
    built = set(cuda._CUDA.architectures.split(","))
    if len(built) > 1:  # not narrowed by TORCH_CUDA_ARCH_LIST
        assert {"sm_80", "sm_90a", "sm_100", "compute_100"} <= built
    for arch in (a for a in built if a.startswith("sm_")):
        names = [name for a, name in resources if a == arch]
        for kernel in KERNELS:
            assert any(kernel in name for name in names), f"{kernel} for {arch}"
    assert {arch for arch, _ in resources} <= built


def test_no_spills_and_no_local_arrays(resources):
    wrong = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not wrong


def test_shared_memory_fits_without_asking(resources):
    """What is declared in a kernel; beyond it only the small layers ask for a gate's table."""
    assert all(use["SHARED"] <= 48 << 10 for use in resources.values())


def test_registers_leave_room(resources):
    """512 threads on a multiprocessor hide what memory takes; fp64 and sm_100's small layers have fewer."""
    for (arch, name), use in resources.items():
        if "small_kernel" in name and (arch == "sm_100" or "kernelId" in name):
            continue
        assert use["REG"] <= 128, f"{name} on {arch}: {use['REG']} registers"


@pytest.mark.parametrize(
    "kernel", ["11pack_kernel", "13unpack_kernel", "16pack_rows_kernel", "18unpack_rows_kernel"]
)
def test_accesses_of_16_bytes(code, kernel):
    seen = [(key, text) for key, text in code.items() if kernel in key[1]]
    assert seen
    for (arch, name), text in seen:
        assert "STG.E.128" in text, f"{name} on {arch} stores no 16 bytes at a time"
        narrow = re.search(
            r"kernelINS_(4Half|8BFloat16)Ef", name
        )  # 16 bits to fp32: four elements are 8 bytes
        copied = re.search(r"LDGSTS\S*\.128", text)  # to shared memory
        assert narrow or copied or "LDG.E.128" in text, f"{name} on {arch} loads no 16 bytes at a time"


@pytest.mark.parametrize(
    ("kernel", "load", "at_once"),
    [
        ("16pack_rows_kernelINS_8BFloat16ES3_", "LDG.E.128", 4),
        ("18unpack_rows_kernelINS_8BFloat16ES3_Lb0E", "LDG.E.128", 4),
        ("18unpack_rows_kernelINS_8BFloat16ES3_Lb1E", "LDG.E.128", 8),
        ("11pack_kernelINS_8BFloat16ES3_", "LDG.E.U16", 16),
        ("13unpack_kernelINS_8BFloat16ES3_Lb1E", "LDG.E.128", 4),
        ("14penalty_kernelIf", "LDG.E.128", 4),
    ],
)
def test_loads_are_under_way_together(code, kernel, load, at_once):
    """No store and no barrier between them: what keeps the memory busy."""
    for (arch, name), text in code.items():
        if kernel not in name:
            continue
        seen = re.findall(r"\b(LDG\S*|STG\S*|STS\S*|LDS\S*|WARPSYNC|BAR\S*|DEPBAR\S*)", text)
        longest = run = 0
        for instruction in seen:
            run = run + (instruction == load) if instruction.startswith("LDG") else 0
            longest = max(longest, run)
        assert longest >= at_once, f"{name} on {arch}: {longest} of {load}"


def test_penalty_reads_weights_16_bytes_at_a_time(code):
    for (arch, name), text in code.items():
        if "penalty_kernel" in name:
            assert "LDG.E.128" in text, f"{name} on {arch}"


def test_clusters_where_there_are_any(code):
    for (arch, name), text in code.items():
        if "sample_kernel" in name:
            assert ("UCGABAR" in text) == (arch not in ("sm_80", "sm_86", "sm_89")), f"{name} on {arch}"


def test_small_layers_multiply_in_registers(code):
    for (arch, name), text in code.items():
        if "small_kernel" in name:
            fused = "DFMA" if "kernelId" in name else "FFMA"
            assert text.count(fused) >= 8 * 16, f"{name} on {arch}"


NO_DRIVER = """
import torch, l0kernels, l0kernels._CUDA as m
print(m.device_error())
where, dist = (0, 0), (2 / 3, -0.1, 1.1)
side = (4, None, False, False)
calls = [
    lambda: m.sample([0], [4], False, 0, 0, dist, 0.9, 0, 0, 0, 0, where),
    lambda: m.gate_grad(0, 0, 0, 4, False, dist, where),
    lambda: m.pack((0, 4, 1), 0, 0, 4, 4, 0, side, side, False, (1, 1, 1, 2), where),
    lambda: m.unpack(0, 4, 0, 0, 4, 0, side, side, False, (0, 0, 0), 0, 0, 0, 0, (1, 1, 1, 2), where),
    lambda: m.penalty([(0, 0, 4, 1.0)], [], False, dist, 0, 0, 0, 0, where),
    lambda: m.small_linear_forward(0, 4, 4, 4, (0, 4, 1), (0, 4, 1), 0, None, None, True, 0, None, where),
    lambda: m.small_linear_backward(0, 4, 4, 4, (0, 4, 1), (0, 4, 1), 0, None, None, True, False, False,
                                    (0, 4, 1), 1, 0, 0, 0, 0, 0, 0, 0, 0, None, where),
    lambda: m.small_mlp_forward(0, 4, (0, 4, 1), 1, [(4, 4, (0, 4, 1), 0, None, 0)], 0, None, where),
    lambda: m.small_mlp_backward(0, 4, (0, 4, 1), 1, [(4, 4, (0, 4, 1), 0, None, 0)], [(1, 0, 0, 0, 0)],
                                 [False], (0, 4, 1), 0, 0, None, where),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
    else:
        raise SystemExit("a launcher did not raise")
"""


def test_without_a_device_every_launcher_says_so():
    """The module imports where there is no driver; CUDA_VISIBLE_DEVICES hides one that is there."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = fresh.run(NO_DRIVER, os.getcwd(), environment)
    assert done.returncode == 0, done.stderr
    reason, *errors = done.stdout.splitlines()
    assert len(errors) == 9
    assert reason.startswith("cudaError")
    for what, error in zip(
        ["sample", "gate_grad", "pack", "unpack", "penalty", *["small layer"] * 4], errors, strict=True
    ):
        assert error.startswith(f"l0kernels {what}: cudaError"), error


def test_why_not_names_the_reason():
    import torch

    reason = cuda.why_not()
    assert (reason is None) == torch.cuda.is_available()
    if reason is not None:
        assert "CUDA" in reason or "cuda" in reason
