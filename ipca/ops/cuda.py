"""Registration of ``ipca::pc_linear`` for CUDA as a ``triton_op``: torch.compile traces the kernels inside.

Importing this module loads triton. Backward is an op of its own: a kernel started in an autograd rule outside of an op
would go through PyTorch's tracing machinery in eager mode, at about a millisecond a call.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch.library import triton_op

from ipca._cache_folder import default_cache_folder
from ipca.kernels import tables
from ipca.ops import op


def _build() -> str:
    """A hash of everything that decides how the ops decompose: their sources, the kernels', and every measured table.

    torch.compile caches graphs on disk under a key of an op's name and arguments, without its body. As an argument this
    hash keeps torch.compile from using a graph of an earlier version, or of a time before a measurement.
    """
    folders = (Path(__file__).parent, Path(tables.__file__).parent, tables.SHIPPED, default_cache_folder())
    files = sorted(path for folder in folders for path in folder.glob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


BUILD = _build()

pc_linear_cuda_op: Any = triton_op("ipca::pc_linear_cuda", op.forward, mutates_args=())
pc_linear_cuda_backward_op = triton_op("ipca::pc_linear_cuda_backward", op.backward, mutates_args=())
pc_linear_cuda_op.register_autograd(op.autograd_rule(pc_linear_cuda_backward_op), setup_context=op.setup_context)
