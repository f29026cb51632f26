"""Triton's interpreter as the tests run it: arithmetic that no processor changes, and less work for the same values."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch


def prepare() -> None:
    """Patch the interpreter for the rest of this process, in which nothing is compiled."""
    interpreter = import_module("triton.runtime.interpreter")
    products_and_bfloat16(interpreter)
    quick(interpreter)


def products_and_bfloat16(interpreter: Any) -> None:
    """The interpreter multiplies by numpy's matmul, and keeps bfloat16 as bits.

    How matmul rounds hangs on the processor, and on some a row's bits hang on its place in the tile: here products are
    summed over k in order, which is the same everywhere. Bits it would multiply as integers and cut off in casts: here
    casts round to nearest even and products are those of the numbers, as on a GPU. All other arithmetic of two
    bfloat16, which our kernels do in float32, is refused instead of being done on the bits.
    """
    import numpy as np
    import triton.language as tl

    TensorHandle = interpreter.TensorHandle

    def is_bfloat16(x: Any) -> bool:
        return bool(x.dtype.scalar.name == "bf16")

    def wide(x: Any) -> Any:
        """A handle's numbers in float32 where they are bfloat16."""
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32) if is_bfloat16(x) else x

    def narrow(numbers: Any) -> Any:
        bits = torch.from_numpy(numbers.astype("float32")).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), tl.bfloat16)

    builder = interpreter.InterpreterBuilder
    cast_impl = builder.cast_impl

    def cast(self: Any, x: Any, to: Any) -> Any:
        if to.scalar.name == "bf16":
            return x if is_bfloat16(x) else narrow(x.data)
        return cast_impl(self, wide(x), to)

    def dot(self: Any, a: Any, b: Any, sums: Any, *precision: Any) -> Any:
        """sums + a b: [..., M, N] + [..., M, K] [..., K, N]. No operation here adds and multiplies at once."""
        a, b = wide(a).data.swapaxes(-1, -2)[..., None], wide(b).data[..., None, :]
        terms = np.multiply(a, b, dtype=sums.data.dtype, order="C")  # [..., K, M, N]: k outside is added in order
        return TensorHandle(terms.sum(-3, dtype=terms.dtype) + sums.data, sums.dtype.scalar)

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: Any, *handles: Any) -> Any:
            for x in handles:
                if type(x) is TensorHandle and is_bfloat16(x):
                    raise NotImplementedError("arithmetic in bfloat16: cast to float32 first")
            return operation(self, *handles)

        return refuse

    builder.cast_impl, builder.create_dot = cast, dot
    for name in ("binary_op", "unary_op", "create_fabs", "create_fma", "create_clampf"):
        setattr(builder, name, refusing(getattr(builder, name)))
    reduction = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, tensors: Any) -> None:
        reduction(self, tensors)
        if any(is_bfloat16(x.handle) for x in tensors):
            raise NotImplementedError("reductions in bfloat16: cast to float32 first")

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def quick(interpreter: Any) -> None:
    """Nine tenths of the time went into what leads to no value.

    Into patching the language at each launch and at each call of a device function, `tl.sum` included; into types and
    shapes, made and compared anew for every value; and into a check of integers for overflow whose result is thrown
    away: here it is made in numpy, and counts.
    """
    import numpy as np
    import triton.language as tl

    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        if fn.__module__ not in patched:
            patch_lang(fn)
            patched.add(fn.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once

    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    interpreter._get_np_dtype = get_np_dtype

    block_type, constexpr = tl.core.block_type, tl.core.constexpr
    init_block, shapes = block_type.__init__, {}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        """Each shape is unwrapped and validated once: its types share it, as ints and as the constants of a tensor."""
        sizes = tuple([n.value if type(n) is constexpr else n for n in shape])
        found = shapes.get(sizes)
        if found is None:
            init_block(self, element_ty, shape)
            constants = tl.core.tuple([constexpr(n) for n in sizes])
            found = shapes[sizes] = (self.shape, self.numel, str(self.shape), constants, constexpr(self.numel))
        self.element_ty = element_ty
        self.shape, self.numel, text, *self.of_tensor = found
        self.name = f"<{text}, {element_ty.name}>"

    block_type.__init__ = init_block_type
    scalar = tl.core.tuple([]), constexpr(1)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if isinstance(type, block_type) else scalar

    tl.core.tensor.__init__ = init_tensor

    semantic = type(interpreter.interpreter_semantic)
    cast, broadcast = semantic.cast, semantic.broadcast_impl_value
    computed = semantic.binary_op_type_checking_impl
    alike = {dtype.name for dtype in (tl.int1, tl.int32, tl.int64, tl.float16, tl.float32, tl.float64)}

    def cast_where_it_must(self: Any, x: Any, to: Any, *rounding: Any, **options: Any) -> Any:
        return x if x.type.scalar is to.scalar else cast(self, x, to, *rounding, **options)

    def broadcast_where_it_must(self: Any, a: Any, b: Any) -> Any:
        """Operands of one shape stay as they are."""
        return (a, b) if a.shape is b.shape else broadcast(self, a, b)

    def check_types(self: Any, a: Any, b: Any, *how: Any) -> Any:
        """Two tensors of one type are computed in that type, unless they are divided."""
        if type(a) is type(b) is tl.core.tensor and a.dtype is b.dtype and len(how) < 4 and a.dtype.name in alike:
            return broadcast_where_it_must(self, a, b)
        return computed(self, a, b, *how)

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_overflow(self: Any, a: Any, b: Any, operation: Any) -> None:
        if a.dtype.int_bitwidth >= 64:
            return
        name, bounds = operation.__name__, np.iinfo(a.handle.data.dtype) if a.dtype.int_bitwidth > 1 else None
        result = operations[name](a.handle.data, b.handle.data, dtype=np.int64)
        assert bounds is None or (result.min() >= bounds.min and result.max() <= bounds.max), f"{name} overflows"

    semantic.cast, semantic.broadcast_impl_value = cast_where_it_must, broadcast_where_it_must
    semantic.binary_op_type_checking_impl = check_types
    semantic.binary_op_sanitize_overflow_impl = check_overflow
