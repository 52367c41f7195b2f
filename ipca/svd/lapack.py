"""LAPACK routines without the GIL: the function pointers that SciPy exports to Cython, called through ctypes.

SciPy's own wrappers of these routines hold the GIL, so that matrices in threads would wait for each other.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_void_p, py_object
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_lapack

_KNOWN = re.compile(r"void \(((char|int|double|__pyx_t_\w+_lapack_d) \*(, )?)+\)")
"""Signatures that are safe to call: 32-bit integers and float64, everything by pointer."""


@cache
def routine(name: str) -> Callable[..., None] | None:
    """The routine ``name``, or None where SciPy does not export it with 32-bit integers.

    Arguments are those of Fortran except for ``info``: text as bytes, numbers as int or float64 arrays, matrices as
    arrays whose rows are LAPACK's columns. A number that is returned is given as ``ctypes.c_int``.

    Raises (the routine):
        LinAlgError: ``info`` is not 0.
    """
    capsule = getattr(cython_lapack, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return None
    api: Any = ctypes.pythonapi
    get_name, get_pointer = api.PyCapsule_GetName, api.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = c_char_p, [py_object]
    get_pointer.restype, get_pointer.argtypes = c_void_p, [py_object, c_char_p]
    signature = get_name(capsule)
    if not _KNOWN.fullmatch(signature.decode()):
        return None
    pointers = [c_void_p] * signature.count(b"*")
    function = ctypes.CFUNCTYPE(None, *pointers)(get_pointer(capsule, signature))

    def call(*arguments: Any) -> None:
        info = c_int(0)
        function(*map(_pointer, (*arguments, info)))
        if info.value:
            raise np.linalg.LinAlgError(f"LAPACK's {name} ended with info={info.value}")

    return call


def available(*names: str) -> bool:
    """Whether all of these routines are there."""
    return all(routine(name) for name in names)


def _pointer(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    if isinstance(value, int):
        return byref(c_int(value))
    return value if isinstance(value, bytes) else byref(value)
