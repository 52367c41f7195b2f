"""The inner loops of :mod:`ipca.svd.inner_loops_torch` where their tensors are: CUDA kernels on a GPU, else PyTorch.

The functions run at once; under torch.compile, and on fake tensors, they are the registered ops ``ipca::ldlt_panel_``,
``ipca::scaled_cholesky`` and ``ipca::lanczos_step_``. A call is short, and there are hundreds for a matrix: going
through the dispatcher every time would cost more than some of them.

On a GPU nothing waits for the device. Where the extension cannot be had, its PyTorch version runs after one warning.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ipca import _extension
from ipca.svd import inner_loops_torch as primitives

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def ldlt_panel_(panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    """:func:`ipca.svd.inner_loops_torch.ldlt_panel_`."""
    (ldlt_panel_op if _traced(panel) else _ldlt_panel_)(panel, growth, positive, tiny)


def scaled_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ipca.svd.inner_loops_torch.scaled_cholesky`."""
    return (scaled_cholesky_op if _traced(G) else _scaled_cholesky)(G)


def lanczos_step_(basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int) -> None:
    """:func:`ipca.svd.inner_loops_torch.lanczos_step_`."""
    (lanczos_step_op if _traced(basis) else _lanczos_step_)(basis, product, alpha, beta, step)


def _ldlt_panel_(panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    if (extension := _extension_for(panel)) is None:
        primitives.ldlt_panel_(panel, growth, positive, tiny)
    else:
        launch_ldlt_panel(extension, panel, growth, positive, tiny)


def _scaled_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    extension = _extension_for(G)
    return primitives.scaled_cholesky(G) if extension is None else launch_scaled_cholesky(extension, G)


def _lanczos_step_(basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int) -> None:
    if (extension := _extension_for(basis)) is None:
        primitives.lanczos_step_(basis, product, alpha, beta, step)
    else:
        launch_lanczos_step(extension, basis, product, alpha, beta, step)


ldlt_panel_op = torch.library.custom_op("ipca::ldlt_panel_", _ldlt_panel_, mutates_args=("panel", "growth", "positive"))
lanczos_step_op = torch.library.custom_op(
    "ipca::lanczos_step_", _lanczos_step_, mutates_args=("basis", "product", "alpha", "beta")
)


@torch.library.custom_op("ipca::scaled_cholesky", mutates_args=())
def scaled_cholesky_op(G: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major, as the fake promises; PyTorch's triangular solve gives columns."""
    T, shift = _scaled_cholesky(G)
    return T.contiguous(), shift


@ldlt_panel_op.register_fake
def _(panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None: ...


@scaled_cholesky_op.register_fake
def _(G: Tensor) -> tuple[Tensor, Tensor]:
    return G.new_empty(G.shape), G.new_empty(G.shape[0])


@lanczos_step_op.register_fake
def _(basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int) -> None: ...


def launch_ldlt_panel(extension: ModuleType, panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    """Launch the kernels; any strides, but those of a row and of ``positive``."""
    batch, rows, k = panel.shape
    _check("panel", panel, panel, (batch, rows, k), adjacent=True)
    _check("growth", growth, panel, (batch, rows))
    _check("positive", positive, panel, (batch,), torch.int64, adjacent=True)
    tiny = tiny.to(panel.dtype).contiguous()
    _check("tiny", tiny, panel, (batch,))
    getattr(extension, f"ldlt_panel_{_SUFFIX[panel.dtype]}")(
        *_place(panel), panel.data_ptr(), *panel.stride()[:2], growth.data_ptr(), *growth.stride(),
        positive.data_ptr(), tiny.data_ptr(), batch, rows, k,
    )  # fmt: skip


def launch_scaled_cholesky(extension: ModuleType, G: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel, which reads the lower triangle of ``G``."""
    batch, p, _ = G.shape
    _check("G", G, G, (batch, p, p))
    G = G if G.stride(-1) == 1 else G.contiguous()
    T, shift = torch.empty_like(G, memory_format=torch.contiguous_format), G.new_empty(batch)
    getattr(extension, f"scaled_cholesky_{_SUFFIX[G.dtype]}")(
        *_place(G), G.data_ptr(), *G.stride()[:2], T.data_ptr(), shift.data_ptr(), batch, p
    )
    return T, shift


def launch_lanczos_step(
    extension: ModuleType, basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int
) -> None:
    """Launch the kernel; any strides, but those of a vector."""
    vectors, chains, n = basis.shape
    if not 0 <= step < vectors - 1:
        raise ValueError(f"step {step} of a basis with room for {vectors} vectors; 0 to {vectors - 2} fit.")
    _check("basis", basis, basis, (vectors, chains, n), adjacent=True)
    _check("product", product, basis, (chains, n), adjacent=True)
    _check("alpha", alpha, basis, (chains, vectors - 1))
    _check("beta", beta, basis, (chains, vectors - 1))
    alpha, beta = alpha[:, step], beta[:, step]
    getattr(extension, f"lanczos_step_{_SUFFIX[basis.dtype]}")(
        *_place(basis), basis.data_ptr(), *basis.stride()[:2], product.data_ptr(), product.stride(0),
        alpha.data_ptr(), alpha.stride(0), beta.data_ptr(), beta.stride(0), chains, n, step,
    )  # fmt: skip


def _check(
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    adjacent: bool = False,
) -> None:
    """The kernels get raw pointers: what does not fit would be written past its end."""
    dtype = dtype or like.dtype
    if like.dtype not in _SUFFIX:
        raise TypeError(f"{name} is {like.dtype}; the kernels take float32 and float64.")
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device:
        came, fits = (tuple(tensor.shape), tensor.dtype, tensor.device), (shape, dtype, like.device)
        raise ValueError(f"{name} is {' '.join(map(str, came))}; {' '.join(map(str, fits))} fits.")
    if adjacent and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}'s last dimension has stride {tensor.stride(-1)}; 1 fits. Make it contiguous.")


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device index and current stream."""
    if not tensor.is_cuda:
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _extension_for(tensor: Tensor) -> ModuleType | None:
    return _extension_on(tensor.get_device()) if tensor.is_cuda else None


@cache
def _extension_on(index: int) -> ModuleType | None:
    return _extension.load(index, torch.cuda.get_device_capability(index))


def _traced(tensor: Tensor) -> bool:
    """Whether a call has to go through the dispatcher to be seen: by torch.compile, or as one on a fake tensor."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor
