"""Choosing a backend: use_backend, L0KERNELS_BACKEND, the table, and that asking never falls back."""

import _thread
import asyncio
import contextvars
import os
import runpy
import threading
import time
from importlib import util

import fresh
import pytest
import torch

import l0kernels as l0
from l0kernels import _native, _ops, _registry, reference
from l0kernels._native import native
from l0kernels._registry import NAMES, PRIMITIVES
from op_checks import SEED

pytestmark = pytest.mark.usefixtures("seeded")

needs_native = pytest.mark.skipif(native is None, reason="l0kernels._C was not built")


def run(code, *, check=True, **environment):
    """stdout of ``code`` in a process of its own; with check=False its stderr, once it has failed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("L0KERNELS_")}
    done = fresh.run(code, os.getcwd(), clean | environment)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout if check else done.stderr


def layer():
    return l0.l0_linear(torch.ones(2, 3), torch.ones(4, 3), in_log_alpha=torch.zeros(3), seed=SEED)


@pytest.fixture
def used(monkeypatch):
    """Names of the backends whose functions ran."""
    names = []
    real = _ops.module

    def module(name):
        names.append(name)
        return real(name)

    monkeypatch.setattr(_ops, "module", module)
    return names


class TestUseBackend:
    def test_the_named_backend_computes(self, backend, used):
        layer()
        assert set(used) == {backend}

    def test_reference_computes_itself(self, used, monkeypatch):
        with l0.use_backend("reference"):
            y = layer()
        assert used == []
        assert torch.equal(
            y, reference.l0_linear(torch.ones(2, 3), torch.ones(4, 3), in_log_alpha=torch.zeros(3), seed=SEED)
        )

    def test_default_is_the_fastest(self, used):
        layer()
        assert set(used) == {"torch" if native is None else "cpp"}

    def test_nesting_and_restoring(self, used):
        outside = _registry.requested()
        with l0.use_backend("torch"):
            with l0.use_backend("reference"):
                assert _registry.requested() == "reference"
            layer()
        assert set(used) == {"torch"}
        assert _registry.requested() == outside

    def test_restored_after_an_exception(self):
        outside = _registry.requested()
        with pytest.raises(KeyError), l0.use_backend("torch"):
            raise KeyError
        with pytest.raises(ValueError, match="log_alpha"), l0.use_backend("torch"):
            l0.sample_gates(torch.tensor([float("nan")]))
        assert _registry.requested() == outside

    @pytest.mark.parametrize("name", ["numpy", "CPP", "", None, 3, ["cpp"]])
    def test_unknown_name(self, name):
        outside = _registry.requested()
        expected = r"name must be one of 'reference', 'torch', 'cpp', 'triton', 'cuda', got "
        with pytest.raises(ValueError, match=expected), l0.use_backend(name):
            pytest.fail("entered")
        assert _registry.requested() == outside

    def test_unavailable_never_falls_back(self):
        missing = [name for name in NAMES if _registry.why_not(name)]
        for name in missing:
            with (
                pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used: "),
                l0.use_backend(name),
            ):
                pytest.fail("entered")

    def test_missing_extension_names_its_reason(self, monkeypatch):
        monkeypatch.setattr(_native, "why_not", "it was not built")
        reason = pytest.raises(RuntimeError, match="backend 'cpp' cannot be used: it was not built")
        with reason, l0.use_backend("cpp"):
            pytest.fail("entered")
        monkeypatch.setattr(_registry, "_of_process", "cpp")
        with pytest.raises(RuntimeError, match="backend 'cpp' cannot be used: it was not built"):
            layer()
        assert l0.backends()["sample"]["cpp"] == "it was not built"

    @needs_native
    def test_wrong_device(self):
        with (
            l0.use_backend("cpp"),
            pytest.raises(RuntimeError, match="it serves tensors on the CPU, got cuda:0"),
        ):
            _registry.resolve(torch.device("cuda", 0), torch.float32, "sample")

    def test_a_gpu_without_its_kernels_uses_the_formula(self, monkeypatch):
        monkeypatch.setattr(_registry, "_why_no_triton", lambda: "none here")
        monkeypatch.setattr(_registry, "_why_no_cuda", lambda: "none here")
        for primitive in PRIMITIVES:
            assert _registry.resolve(torch.device("cuda", 0), torch.float32, primitive) == "reference"

    def test_on_a_gpu_the_measured_winner_serves(self, monkeypatch):
        gpu = torch.device("cuda", 0)
        monkeypatch.setattr(_registry, "_why_no_triton", lambda: None)
        monkeypatch.setattr(_registry, "_why_no_cuda", lambda: None)
        for primitive in PRIMITIVES:
            first = primitive in _registry.CUDA_FIRST and primitive not in ("gated_linear", "gated_mlp")
            winner = "cuda" if first else "triton"
            assert _registry.resolve(gpu, torch.bfloat16, primitive) == winner
            assert _registry.resolve(gpu, torch.float64, primitive) == "reference"
        monkeypatch.setattr(_registry, "_why_no_cuda", lambda: "none here")
        assert {_registry.resolve(gpu, torch.float32, p) for p in PRIMITIVES} == {"triton"}

    def test_a_backend_that_does_not_serve_a_primitive_says_so(self, monkeypatch):
        monkeypatch.setattr(_registry, "_why_no_cuda", lambda: None)
        monkeypatch.setattr(_registry, "_of_process", "cuda")
        with pytest.raises(RuntimeError, match="it does not serve block_linear; the triton backend does"):
            _registry.resolve(torch.device("cuda", 0), torch.float32, "block_linear")
        with pytest.raises(RuntimeError, match="it serves tensors on CUDA, got cpu"):
            _registry.resolve(torch.device("cpu"), torch.float32, "sample")

    def test_backward_uses_the_backend_of_its_forward(self, backend, used):
        weight = torch.ones(4, 3, requires_grad=True)
        y = l0.l0_linear(torch.ones(2, 3), weight, in_log_alpha=torch.zeros(3), seed=SEED)
        used.clear()
        with l0.use_backend("reference"):
            y.sum().backward()
        assert set(used) == {backend}
        assert weight.grad is not None

    def test_threads_choose_by_themselves(self):
        """Scopes that overlap in time: each thread sees its own, and none stays behind."""
        entered, left, seen = threading.Event(), threading.Event(), {}

        def first():
            with l0.use_backend("torch"):
                entered.set()
                left.wait(10)
                seen["first"] = _registry.requested()
            seen["after"] = _registry.requested()

        def second():
            entered.wait(10)
            seen["before"] = _registry.requested()
            with l0.use_backend("reference"):
                seen["second"] = _registry.requested()
                left.set()
                threads[0].join(10)
                seen["second, later"] = _registry.requested()

        outside = _registry.requested()
        threads = [threading.Thread(target=target) for target in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own = {"first": "torch", "second": "reference", "second, later": "reference"}
        assert seen == {**own, "before": outside, "after": outside}
        assert _registry.requested() == outside
        assert not _registry._scopes

    def test_generators_that_take_turns(self):
        """Their scopes end in another order than that of their beginning."""

        def scope(name):
            with l0.use_backend(name):
                yield _registry.requested()

        before = _registry.requested()
        first, second = scope("torch"), scope("reference")
        assert (next(first), next(second)) == ("torch", "reference")
        first.close()
        assert _registry.requested() == "reference"
        second.close()
        assert _registry.requested() == before

    def test_a_thread_begins_without_it(self, used):
        with l0.use_backend("torch"):
            thread = threading.Thread(target=layer)
            thread.start()
            thread.join()
            assert set(used) == {"torch" if native is None else "cpp"}
            used.clear()
            thread = threading.Thread(target=contextvars.copy_context().run, args=[layer])
            thread.start()
            thread.join()
            assert set(used) == {"torch"}

    def test_a_thread_that_python_did_not_start_follows(self):
        """As autograd's of a GPU, where a checkpoint computes the forward again."""
        seen = []
        with l0.use_backend("torch"):
            _thread.start_new_thread(lambda: seen.append(_registry.requested()), ())
            while not seen:
                time.sleep(0.001)
        assert seen == ["torch"]

    def test_tasks_choose_by_themselves(self):
        """Two tasks of one thread, interleaved: the first to enter is the first to leave."""
        seen = []

        async def task(name, steps):
            with l0.use_backend(name):
                for _ in range(steps):
                    await asyncio.sleep(0)
                    seen.append((name, _registry.requested()))

        async def both():
            await asyncio.gather(task("torch", 3), task("reference", 6))
            seen.append((outside, _registry.requested()))

        outside = _registry.requested()
        asyncio.run(both())
        seen.append((outside, _registry.requested()))
        assert len(seen) == 11
        assert all(expected == got for expected, got in seen)
        assert _registry._of_thread.entered is None

    def test_compiled_code_is_compiled_again(self, used):
        """Guards look at the backend of the thread that calls."""
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        fastest, seen = "torch" if native is None else "cpp", []

        def backend():
            used.clear()
            compiled()
            return set(used)

        assert backend() == {fastest}
        with l0.use_backend("torch"):
            assert backend() == {"torch"}
            thread = threading.Thread(target=lambda: seen.append(backend()))
            thread.start()
            thread.join()
            with l0.use_backend("reference"):
                assert backend() == set()
            assert backend() == {"torch"}
        assert backend() == {fastest}
        assert seen == [{fastest}]

    def test_within_compiled_code(self, used):
        """A scope there holds in what Dynamo leaves to Python, too, unless that has one of its own."""
        seen = []

        @torch.compiler.disable
        def look():
            seen.append(_registry.requested())
            with l0.use_backend("reference"):
                seen.append(_registry.requested())
            seen.append(_registry.requested())

        @torch.compile(backend="eager")
        def run():
            with l0.use_backend("torch"):
                layer()
                look()
                layer()
            layer()

        outside = _registry.requested()
        run()
        assert seen == ["torch", "reference", "torch"]
        assert set(used) == {"torch", "torch" if native is None else "cpp"}
        assert _registry.requested() == outside

    def test_every_backend_agrees(self):
        weight, x, log_alpha = torch.randn(40, 30), torch.randn(5, 30), torch.randn(30)
        results = {}
        for name in [n for n in NAMES if not _registry.why_not(n)]:
            with l0.use_backend(name):
                results[name] = l0.l0_linear(x, weight, in_log_alpha=log_alpha, seed=SEED)
        assert {"reference", "torch"} <= set(results)
        for y in results.values():
            torch.testing.assert_close(y, results["reference"], rtol=1e-5, atol=1e-4)


class TestEnvironment:
    def test_named_and_context_wins(self):
        names = [n for n in ("reference", "torch", "cpp") if not _registry.why_not(n)]
        code = (
            "import torch, l0kernels as l0; from l0kernels import _registry as r\n"
            "cpu = (torch.device('cpu'), torch.float32, 'sample')\n"
            "print(r.resolve(*cpu))\n"
            f"for name in {names}:\n"
            "    with l0.use_backend(name): print(r.resolve(*cpu))\n"
            "print(r.resolve(*cpu))\n"
        )
        assert run(code, L0KERNELS_BACKEND="reference").split() == ["reference", *names, "reference"]

    @pytest.mark.parametrize(
        ("value", "expected"), [("torch", "torch"), ("", "torch" if native is None else "cpp")]
    )
    def test_read_at_import(self, monkeypatch, value, expected):
        monkeypatch.setenv("L0KERNELS_BACKEND", value)
        spec = util.spec_from_file_location("l0kernels._another_registry", _registry.__file__)
        registry = util.module_from_spec(spec)
        spec.loader.exec_module(registry)
        assert registry.resolve(torch.device("cpu"), torch.float32, "sample") == expected

    def test_unknown(self):
        error = run("import l0kernels", check=False, L0KERNELS_BACKEND="numpy")
        assert "ValueError: the environment variable L0KERNELS_BACKEND must be one of 'reference'" in error
        assert "got 'numpy'" in error

    def test_unavailable(self):
        code = "import torch, l0kernels as l0; l0.sample_gates(torch.zeros(3))"
        error = run(code, check=False, L0KERNELS_BACKEND="cuda")
        assert "RuntimeError: backend 'cuda' cannot be used: " in error


class TestTable:
    def test_rows_and_columns(self):
        table = l0.backends()
        assert tuple(table) == PRIMITIVES
        assert all(tuple(row) == NAMES for row in table.values())

    def test_yes_is_true(self):
        """Every primitive of every backend that says yes is there and runs; every other names a reason."""
        functions = {
            "sample": ("sample",),
            "gate_grad": ("gate_grad",),
            "l0_penalty": ("l0_penalty",),
            "l2_penalty": ("coupled_penalty", "coupled_penalty_grad"),
            "gated_linear": ("linear_forward", "linear_backward"),
            "gated_mlp": ("mlp_forward", "mlp_backward"),
            "gated_conv2d": ("conv2d_forward", "conv2d_backward"),
            "gated_batch_norm": (),
            "gated_attention": (),
            "masked_linear": ("masked_weight", "masked_weight_grad"),
            "block_linear": ("block_linear_forward", "block_linear_backward"),
            "pack": (),
            "unpack": (),
            "prox": ("prox",),
        }
        assert set(functions) == set(PRIMITIVES)
        for primitive, row in l0.backends().items():
            for name, answer in row.items():
                if answer != "yes":
                    assert answer == (_registry.why_not(name) or "-")
                elif name != "reference":
                    assert all(callable(getattr(_ops.module(name), f)) for f in functions[primitive])
        assert l0.backends()["gated_linear"]["reference"] == "yes"
        assert l0.backends()["gated_linear"]["torch"] == "yes"
        assert (l0.backends()["gated_linear"]["cpp"] == "yes") == (native is not None)

    def test_prints(self):
        text = str(l0.backends())
        assert text == repr(l0.backends())
        header, *rows = text.splitlines()
        assert header.split() == list(NAMES)
        for row, primitive in zip(rows, PRIMITIVES, strict=False):
            assert row.split()[0] == primitive
            marks = ["yes" if l0.backends()[primitive][name] == "yes" else "-" for name in NAMES]
            assert row.split()[1:] == marks
        missing = [name for name in NAMES if _registry.why_not(name)]
        reasons = [f"{name}: {_registry.why_not(name)}" for name in missing]
        on_cuda = rows[len(PRIMITIVES) + len(missing) :]
        assert rows[len(PRIMITIVES) : -len(on_cuda)] == [*reasons]
        assert on_cuda[0] == "on CUDA tensors:"
        assert tuple(row.split()[0] for row in on_cuda[1:]) == PRIMITIVES

    def test_command(self, capsys):
        runpy.run_module("l0kernels", run_name="__main__")
        text = capsys.readouterr().out
        assert f"l0kernels {l0.__version__}, torch {torch.__version__}" in text
        assert str(l0.backends()) in text
        assert ("native kernels: " in text) == (native is not None)


class TestWithoutTheExtension:
    BLOCK = "import sys; sys.modules['l0kernels._C'] = None\n"

    def test_everything_works_in_plain_torch(self):
        code = (
            self.BLOCK
            + "import torch, l0kernels as l0; from l0kernels import _registry as r\n"
            + "assert r._native.native is None\n"
            + "assert r.resolve(torch.device('cpu'), torch.float32, 'sample') == 'torch'\n"
            + "w = torch.ones(4, 3, requires_grad=True)\n"
            + "l0.l0_linear(torch.ones(2, 3), w, in_log_alpha=torch.zeros(3)).sum().backward()\n"
            + "assert w.grad is not None\n"
            + "print(l0.backends()['gated_linear']['cpp'])"
        )
        assert "l0kernels._C" in run(code)
