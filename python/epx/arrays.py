# SPDX-License-Identifier: MIT
"""What EPX needs to know of an array: PyTorch's tensors and NumPy's arrays.

Neither package is imported for its own sake: who passes a tensor has PyTorch.
"""

import sys
from typing import Any, Dict, Optional, Sequence, Tuple

from . import _c

# EPX's element types by the names that PyTorch, NumPy and ml_dtypes give them.
DTYPES = {
    "float32": _c.F32,
    "float16": _c.F16,
    "bfloat16": _c.BF16,
    "float8_e4m3fn": _c.F8E4M3,
    "float8_e5m2": _c.F8E5M2,
    "uint8": _c.BYTES,
    "int8": _c.BYTES,
    "int32": _c.I32,
    "int64": _c.I64,
}
_cache: Dict[Any, int] = {}  # dtype object -> code; filled as they are seen


def is_tensor(array: object) -> bool:
    """Whether it is a PyTorch tensor (False when PyTorch is not loaded)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_code(dtype: Any) -> int:
    """The ``epx_dtype_t`` of a dtype of PyTorch or NumPy, or of its name."""
    code = _cache.get(dtype)
    if code is None:
        name = str(dtype).replace("torch.", "")
        code = DTYPES.get(name)
        if code is None:
            raise TypeError(
                f"{dtype} is no element type of EPX; allowed are "
                + ", ".join(DTYPES)
            )
        _cache[dtype] = code
    return code


def pointer(array: Any) -> int:
    """The address of a tensor's or an array's first element."""
    try:
        return array.data_ptr()
    except AttributeError:
        return array.ctypes.data


def strides(array: Any) -> Tuple[int, ...]:
    """Strides in elements."""
    if is_tensor(array):
        return tuple(array.stride())
    return tuple(it // array.itemsize for it in array.strides)


def is_dense(array: Any) -> bool:
    """Whether it is contiguous, row after row."""
    if is_tensor(array):
        return array.is_contiguous()
    return bool(array.flags.c_contiguous)


def dense(name: str, array: Any, shape: Sequence[Optional[int]]) -> int:
    """The address of a contiguous array of this shape (None: any extent)."""
    given = tuple(array.shape)
    if len(given) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, given)
    ):
        wanted = ", ".join("*" if it is None else str(it) for it in shape)
        raise ValueError(f"{name} is {list(given)}; it must be [{wanted}]")
    if not is_dense(array):
        raise ValueError(f"{name} must be contiguous")
    return pointer(array)


def of_type(name: str, array: Any, *codes: int) -> Any:
    """The array, if its element type is one of these."""
    if dtype_code(array.dtype) not in codes:
        names = " or ".join(it for it, code in DTYPES.items() if code in codes)
        raise TypeError(f"{name} is of {array.dtype}; it must be of {names}")
    return array


def is_torch_dtype(dtype: Any) -> bool:
    """Whether it is a dtype of PyTorch's, not one of NumPy's."""
    return type(dtype).__module__ == "torch"


def to_dtype(dtype: Any) -> Any:
    """A dtype of PyTorch as it is; all else as NumPy's, or ml_dtypes'."""
    if is_torch_dtype(dtype):
        return dtype
    import numpy

    try:
        return numpy.dtype(dtype)
    except TypeError:
        import ml_dtypes

        return numpy.dtype(getattr(ml_dtypes, dtype))


def sibling_dtype(array: Any, name: str) -> Any:
    """A dtype by name, of the package that an array is from."""
    if is_tensor(array):
        return getattr(sys.modules["torch"], name)
    return to_dtype(name)
