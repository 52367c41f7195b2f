"""The CUDA registrations of this package's ops as ``triton_op``: torch.compile sees the kernels inside.

Importing this module loads triton. Backward is an op of its own: a kernel started in an autograd rule outside of an op
would go through PyTorch's tracing machinery in eager mode, at about a millisecond a call.
"""

from __future__ import annotations

from typing import Any

from torch.library import triton_op

from ipca.ops import linear, shared

pc_linear_cuda_op: Any = triton_op("ipca::pc_linear_cuda", linear.forward, mutates_args=())
pc_linear_cuda_backward_op = triton_op("ipca::pc_linear_cuda_backward", linear.backward, mutates_args=())
pc_linear_cuda_op.register_autograd(
    linear.autograd_rule(pc_linear_cuda_backward_op), setup_context=linear.setup_context
)

pc_linear_shared_cuda_op: Any = triton_op("ipca::pc_linear_shared_cuda", shared.forward, mutates_args=())
pc_linear_shared_cuda_backward_op = triton_op("ipca::pc_linear_shared_cuda_backward", shared.backward, mutates_args=())
pc_linear_shared_cuda_op.register_autograd(
    shared.autograd_rule(pc_linear_shared_cuda_backward_op), setup_context=shared.setup_context
)
