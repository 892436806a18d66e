"""Triton's interpreter in a third of its time: what it works out again in every operation and call is kept.

It computes the same, but that an integer that overflows ends a launch. Versions other than 3.6 keep theirs.
"""

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

core = tl.core


def quicken():
    """From here on, in this process."""
    if triton.__version__.startswith("3.6."):
        remember_types()
        replace_the_language_once()
        look_for_overflows_in_numpy()


def remember_types():
    """Types and tensors of one shape share its tuple; the dtype of numpy is looked up by name."""
    block_init, tensor_init, dtype_eq = core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__
    np_dtype_of = interpreter._get_np_dtype
    blocks, tensors, np_dtypes = {}, {}, {}

    def init_block(self, element_ty, shape):
        key = tuple(shape)
        if key in blocks:
            self.shape, self.numel, name = blocks[key]
            self.element_ty, self.name = element_ty, f"<{name}, {element_ty}>"
        else:
            block_init(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, str(self.shape)

    def init_tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key in tensors:
            self.shape, self.numel = tensors[key]
            self.handle, self.type, self.dtype = handle, type, type.scalar
        else:
            tensor_init(self, handle, type)
            tensors[key] = self.shape, self.numel

    def get_np_dtype(type):
        name = type.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype_of(type)
        return np_dtypes[name]

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    core.dtype.__eq__ = lambda self, other: self is other or dtype_eq(self, other)
    interpreter._get_np_dtype = get_np_dtype


def replace_the_language_once():
    """A launch replaces the functions of the language; the functions that the kernel calls find them so."""
    patch_builtin, patch_lang = interpreter._patch_builtin, interpreter._patch_lang
    members, launches = {}, []

    def patch_known(package, builder, scope):
        if package in members:
            for name, member in members[package]:
                scope.set_attr(package, name, member)
        else:
            before = len(scope._changes)
            patch_builtin(package, builder, scope)
            members[package] = [(name, getattr(package, name)) for _, name, _ in scope._changes[before:]]

    class Anyone:
        """What a function sees: kernels the one module, Triton's own library the other."""

    Anyone.__globals__ = {"tl": tl, "core": core}

    class Launch:
        def __init__(self):
            self.scope = patch_lang(Anyone)
            launches.append(self)

        def restore(self):
            self.scope.restore()
            launches.remove(self)

    interpreter._patch_builtin = patch_known
    interpreter._patch_lang = lambda fn: launches[0] if launches else Launch()


def look_for_overflows_in_numpy():
    """The +, - and * of integers once more in int64: by one operation, not by eight of no effect."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def sanitize(self, lhs, rhs, binary_op):
        kind, name = lhs.type.scalar, binary_op.__name__
        if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        assert kind == rhs.type.scalar
        assert kind.is_int()
        exact = operations[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        assert not exact.size or (low <= exact.min() and exact.max() <= high), (
            f"int{kind.int_bitwidth} overflow detected for operation {name}"
        )

    tl.semantic.TritonSemantic.binary_op_sanitize_overflow_impl = sanitize
