"""BLAS and LAPACK without the GIL: the function pointers that SciPy exports to Cython, called through ctypes.

SciPy's own wrappers of these routines hold the GIL, so that matrices in threads would wait for each other.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_void_p, py_object
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

_KNOWN = re.compile(r"void \(((char|int|double|__pyx_t_\w+_d) \*(, |(?=\))))+\)")
"""Signatures that are safe to call: 32-bit integers and float64, everything by pointer."""

_ONE = ctypes.c_double(1.0)
_PTHREADS = 1
"""``openblas_get_parallel()`` of a build with threads of its own; one for OpenMP may share PyTorch's."""
_LOCK = threading.Lock()
_BEFORE: list[int] = []
"""For each block of :func:`one_thread` that has not ended, the number of threads before the first."""
_WORKSPACES: dict[tuple[object, ...], int] = {}
"""Sizes by routine and dimensions."""


@cache
def routine(name: str) -> Callable[..., None] | None:
    """The routine ``name``, or None where SciPy does not export it with 32-bit integers.

    Arguments are those of Fortran without ``info``: text as bytes, integers as int, or as ``c_int`` where they are
    returned, float64 numbers as ``c_double``, arrays as NumPy's; the rows of an array are LAPACK's columns.

    Raises (the routine):
        LinAlgError: ``info`` is not 0.
    """
    from scipy.linalg import cython_blas, cython_lapack  # slow to import, and only needed here

    exported = {**getattr(cython_blas, "__pyx_capi__", {}), **getattr(cython_lapack, "__pyx_capi__", {})}
    if name not in exported:
        return None
    api: Any = ctypes.pythonapi
    get_name, get_pointer = api.PyCapsule_GetName, api.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = c_char_p, [py_object]
    get_pointer.restype, get_pointer.argtypes = c_void_p, [py_object, c_char_p]
    signature = get_name(exported[name])
    if not _KNOWN.fullmatch(signature.decode()):
        return None
    count = signature.count(b"*")
    function = ctypes.CFUNCTYPE(None, *[c_void_p] * count)(get_pointer(exported[name], signature))

    def checked(*arguments: Any) -> None:
        info = c_int(0)
        function(*map(_pointer, (*arguments, info)[:count]))
        if info.value:
            raise np.linalg.LinAlgError(f"LAPACK's {name} ended with info={info.value}")

    return checked


@contextmanager
def one_thread() -> Iterator[None]:
    """Have SciPy's OpenBLAS compute in the calling thread within the block, in the whole process.

    Its threads and PyTorch's spin while they wait for work: with both pools at the width of the machine they keep each
    other from it. Another BLAS than an OpenBLAS with threads of its own is left as it is.
    """
    calls = _thread_calls()
    if calls is None:
        yield
        return
    get_threads, set_threads = calls
    with _LOCK:
        _BEFORE.append(_BEFORE[-1] if _BEFORE else get_threads())
        set_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            before = _BEFORE.pop()
            if not _BEFORE:
                set_threads(before)


@cache
def _thread_calls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions that read and set the number of threads, where SciPy's LAPACK is an OpenBLAS with its own pool."""
    from scipy.linalg import cython_lapack

    library = ctypes.CDLL(cython_lapack.__file__)
    for prefix in ("scipy_openblas", "openblas"):  # in SciPy's own wheels, and elsewhere
        names = [f"{prefix}_{what}" for what in ("get_parallel", "get_num_threads", "set_num_threads")]
        if all(hasattr(library, name) for name in names):
            get_parallel, get_threads, set_threads = (getattr(library, name) for name in names)
            return (get_threads, set_threads) if get_parallel() == _PTHREADS else None
    return None


def available(*names: str) -> bool:
    """Whether all of these routines are there."""
    return all(routine(name) for name in names)


def call(name: str, *arguments: Any) -> None:
    """Call a routine that is known to be there."""
    function = routine(name)
    assert function is not None
    function(*arguments)


def with_workspace(name: str, *arguments: Any) -> None:
    """Call a routine whose last arguments are a workspace and its size, with as much as it asks for."""
    key = name, *(each for each in arguments if not isinstance(each, np.ndarray))
    if key not in _WORKSPACES:
        size = np.empty(1)
        call(name, *arguments, size, -1)
        _WORKSPACES[key] = int(size[0])
    work = np.empty(_WORKSPACES[key])
    call(name, *arguments, work, work.size)


def add_gram_(G: Tensor, A: Tensor) -> None:
    """``G += Aᵀ A`` for float64 ``A (m, n)`` on the CPU: the upper triangle of ``G (n, n)``."""
    if 1 not in A.stride():
        A = A.contiguous()
    (m, n), by_rows = A.shape, A.stride(1) == 1
    step = max(A.stride(0 if by_rows else 1), n if by_rows else m)
    kind = b"N" if by_rows else b"T"
    call("dsyrk", b"L", kind, n, m, _ONE, A.numpy(), step, _ONE, G.numpy(), G.stride(0))


def multiply_rows(rows: np.ndarray, G: Tensor) -> np.ndarray:
    """``rows G (k, n)`` for the symmetric float64 ``G (n, n)`` whose upper triangle is read."""
    product = np.empty_like(rows)
    (k, n), zero = rows.shape, ctypes.c_double(0.0)
    call("dsymm", b"L", b"L", n, k, _ONE, G.numpy(), n, rows, n, zero, product, n)
    return product


def _pointer(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0]
    if isinstance(value, int):
        return byref(c_int(value))
    return value if isinstance(value, bytes) else byref(value)
