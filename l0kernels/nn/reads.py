"""What the forwards of other people's modules do with the layers in them, other than calling them.

A forward that only calls its layers is served by any module with the same outputs. One that reads weights, or
hands gates around, needs the layers themselves. Which it is stands in its bytecode.
"""

import dis
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

KIND = {"device", "dtype", "is_cuda", "requires_grad"}
"""Of a weight: the same in a layer of fewer units."""
WEIGHTS = {"weight", "bias"}
ALL_WEIGHTS = {"_parameters", "get_parameter", "named_parameters", "parameters", "state_dict"}
GATES = {"Gates", "eval_gates", "from_z", "hidden_gate", "in_gate", "log_alpha", "out_gate", "sample_gates"}
GATES |= {"gates", "in_gates", "out_gates", "out_support", "drawn", "weight_gate"}
ANY_MODULE = {"__dict__", "_modules", "children", "get_submodule", "getattr", "modules", "named_children"}
ANY_MODULE |= {"attrgetter", "named_modules", "vars"}
OPENERS = {"enumerate", "filter", "iter", "len", "list", "map", "reduce", "reversed", "tuple", "zip"}
"""Functions that take a container apart."""
KINDS = {"GatedLayer", "HardConcreteGate", "L0FeedForward", "L0Linear", "L0MLP", "L0Residual", "L0Sequential"}
KINDS |= {"L0BatchNorm1d", "L0BatchNorm2d", "L0BatchNorm3d", "L0GroupNorm", "L0LayerNorm", "L0RMSNorm"}
KINDS |= {"L0Conv1d", "L0Conv2d", "L0Conv3d"}
KINDS |= {"L0ConvTranspose1d", "L0ConvTranspose2d", "L0ConvTranspose3d"}
SILENT = {"EXTENDED_ARG", "NOP", "PRECALL"}
METHOD_BIT = sys.version_info >= (3, 12)
"""Whether LOAD_ATTR tells by a bit of its argument that the attribute is called."""


@dataclass
class Reads:
    """What is read in some forwards.

    Attributes:
        names: attributes that are loaded otherwise than to be called.
        called: attributes that are called.
        weights: whether the values of weights may be read.
        all_weights: whether all at once may be, whatever modules they belong to.
        gates: whether it matters that modules are of this package: gates are handed over or asked for, kinds
            are asked for, or x is handed over by that name, which torch's own layers do not know.
        opens: whether modules are taken out of one that is held in a variable, or counted.
        any_module: whether modules are looked up under names that do not stand in the code.
    """

    names: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    weights: bool = False
    all_weights: bool = False
    gates: bool = False
    opens: bool = False
    any_module: bool = False

    def add(self, other: "Reads") -> None:
        self.names |= other.names
        self.called |= other.called
        self.weights |= other.weights
        self.all_weights |= other.all_weights
        self.gates |= other.gates
        self.opens |= other.opens
        self.any_module |= other.any_module


def is_foreign(kind: type) -> bool:
    """Whether a class is neither of torch nor of this package."""
    return kind.__module__.partition(".")[0] not in ("torch", "l0kernels")


def reads_of(module: nn.Module) -> Reads:
    """What the forward of `module` reads, functions included that it calls and hooks of the module."""
    reads = Reads()
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # A layer whose method is held beside it is called past what is put in its place.
    methods = [value for value in vars(module).values() if isinstance(value, MethodType)]
    reads.gates = any(isinstance(m.__self__, nn.Module) and m.__self__ is not module for m in methods)
    for function in (getattr(module, "forward", None), *hooks):
        for code in _codes(function, module, set()):
            _read(code, reads)
    return reads


def _codes(function: Any, owner: nn.Module, seen: set[CodeType]) -> Iterator[CodeType]:
    """The code of a function and of the Python functions that it names, those of torch left out."""
    if isinstance(function, property):
        function = function.fget
    function = getattr(function, "__func__", function)  # of methods, class and static ones included
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    if code is None or code in seen or package in ("torch", "l0kernels"):
        return
    own = [*_with_inner(code, seen)]
    yield from own
    names = {name for inner in own for name in inner.co_names}
    spaces = [getattr(function, "__globals__", {}), vars(owner)]
    spaces += [vars(value) for name in names if isinstance(value := spaces[0].get(name), ModuleType)]
    found = [getattr(type(owner), name, None) for name in names]
    found += [space.get(name) for space in spaces for name in names]
    found += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    for value in found:
        if isinstance(value, FunctionType | MethodType | property):
            yield from _codes(value, owner, seen)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _with_inner(code: CodeType, seen: set[CodeType]) -> Iterator[CodeType]:
    seen.add(code)
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant, seen)


def _read(code: CodeType, reads: Reads) -> None:
    names = {*code.co_names, *code.co_freevars}
    words = {word for value in code.co_consts for word in (value if isinstance(value, tuple) else (value,))}
    words = {word for word in words if isinstance(word, str)}
    keywords = {word for value in code.co_consts if isinstance(value, tuple) for word in value}
    reads.gates |= bool((names | words) & (GATES | KINDS)) or "x" in keywords
    reads.any_module |= bool(names & ANY_MODULE)
    if names & {"attrgetter", "getattr"}:
        words = {part for word in words for part in word.split(".")}
        reads.names |= words
        reads.weights |= bool(words & WEIGHTS)
    steps = [step for step in dis.get_instructions(code) if step.opname not in SILENT]
    own = {step.argval for step in steps if step.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for at, step in enumerate(steps):
        name, behind = step.argval, steps[at + 1 : at + 3]
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            called = step.opname == "LOAD_METHOD" or (METHOD_BIT and bool((step.arg or 0) & 1))
            (reads.called if called else reads.names).add(name)
            if name in WEIGHTS and not called:
                reads.weights |= not (_is_harmless(steps, at, behind) or _is_own(steps[at - 1]))
            elif name in ALL_WEIGHTS:
                reads.all_weights |= not _is_first(steps, at)
                reads.weights |= reads.all_weights
        elif step.opname in ("GET_ITER", "BINARY_SUBSCR", "BINARY_SLICE") or step.argrepr == "[]":
            if _is_tuple(steps[at - 1]):  # an index of tensors only
                continue
            back = at - 1 if step.opname == "GET_ITER" else at - 2
            while back > 0 and steps[back].opname.startswith("CALL"):  # enumerate(self.blocks)
                back -= 1
            # Of what `self.blocks[i]` and `for block in self.blocks` take apart the name is known.
            known = steps[max(back, 0)].opname in ("LOAD_ATTR", "LOAD_CONST")
            reads.opens |= not known or _is_pair(steps[at - 1])
        elif step.opname in ("UNPACK_EX", "UNPACK_SEQUENCE"):
            reads.opens |= _is_variable(steps[at - 1], behind) or _is_of_iterated(steps, at)
        if step.opname.startswith("LOAD_") and (name == "reduce" or (name in OPENERS and name not in own)):
            reads.opens |= _takes_variable(steps[at + 1 :])


def _is_variable(step: dis.Instruction, behind: list[dis.Instruction]) -> bool:
    """Whether it loads one, or takes it from an iteration; unless an attribute of it is meant."""
    attribute = bool(behind) and behind[0].opname in ("LOAD_ATTR", "LOAD_METHOD")
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and not attribute


def _is_of_iterated(steps: list[dis.Instruction], at: int) -> bool:
    """Whether what is unpacked at `at` are the elements of an attribute: of a list of containers."""
    before = [step.opname for step in steps[max(at - 3, 0) : at]]
    return before[-1:] == ["FOR_ITER"] and before[:1] == ["LOAD_ATTR"]


def _takes_variable(behind: list[dis.Instruction]) -> bool:
    """Whether the function whose name was loaded before `behind` is called with a variable itself."""
    for at, step in enumerate(behind):
        if step.opname.startswith("CALL"):
            return False
        if _is_variable(step, behind[at + 1 : at + 2]):
            return True
    return False


def _is_harmless(steps: list[dis.Instruction], at: int, behind: list[dis.Instruction]) -> bool:
    """Whether of a weight only its kind is read, or whether there is one."""
    if behind and behind[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return behind[0].argval in KIND
    if behind and behind[0].opname.startswith("POP_JUMP") and "NONE" in behind[0].opname:
        return True
    if len(behind) > 1 and behind[0].argval is None and behind[1].opname == "IS_OP":
        return True
    return _argument_of(steps, at, "isinstance")


def _is_own(step: dis.Instruction) -> bool:
    """Whether the attribute loaded next is the module's own, and of no layer in it."""
    last = step.argval[-1] if _is_pair(step) else step.argval
    return step.opname.startswith("LOAD_FAST") and last == "self"


def _is_pair(step: dis.Instruction) -> bool:
    """Whether it loads two variables at once, as Python 3.13 does."""
    return step.opname.startswith("LOAD_FAST") and isinstance(step.argval, tuple)


def _is_tuple(step: dis.Instruction) -> bool:
    return step.opname == "BUILD_TUPLE" or (step.opname == "LOAD_CONST" and isinstance(step.argval, tuple))


def _is_first(steps: list[dis.Instruction], at: int) -> bool:
    """Whether it is next(....parameters()), by which people ask for a device or dtype."""
    return _argument_of(steps, at, "next")


def _argument_of(steps: list[dis.Instruction], at: int, function: str) -> bool:
    """Whether the attribute loaded at `at` is the first argument of `function`."""
    at -= 1
    while at > 0 and steps[at].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        at -= 1
    at -= 1
    while at > 0 and steps[at].opname == "PUSH_NULL":
        at -= 1
    return at >= 0 and steps[at].opname == "LOAD_GLOBAL" and steps[at].argval == function
