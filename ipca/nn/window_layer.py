"""WindowLayer and ProductLayer: layers that train one window of their pretrained weight's singular components."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipca._dtensor import full, is_sharded, part_like
from ipca.nn.initialization import (
    InitCertificate,
    InitialFactors,
    LayerRecord,
    add_low_rank,
    check_extra_state,
    check_options,
    decode_extra_state,
    default_adapter_dtype,
    encode_extra_state,
    frozen_weight,
    initial_factors,
)
from ipca.nn.layer_kinds import read_layer, to_matrix
from ipca.nn.lazy_weight import make_lazy_weight, raise_read_only
from ipca.nn.subclasses import Subclass
from ipca.ops.op import without_autocast
from ipca.ops.pair import balanced_pair, drop_kept_pair, one_pair
from ipca.svd.result import SVDReport
from ipca.window import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack

Layer = TypeVar("Layer", bound="WindowLayer")
_FACTORS = ("lora_A", "lora_B", "lora_A0", "lora_B0")
_counting_blocks = threading.Lock()


class LayerOptions(TypedDict, total=False):
    """Keywords that every adapted layer takes, see :class:`ipca.nn.LinearPC`."""

    alpha: float | None
    form: str
    dropout: float
    adapter_dtype: torch.dtype | None
    tol: float | str
    train: str
    magnitude: float | str


class WindowLayer(nn.Module):
    """A layer whose weight, read as a matrix ``W (out, in)``, trains a window ``w`` of its singular components.

    For ``W = U S Vh``::

        A0 = √(S_w / scaling) Vh_w,   B0 = U_w √(S_w / scaling),   scaling = alpha / rank

        form="intact"     W_base = W                      W_eff = W_base + scaling · (B A − B0 A0)
        form="residual"   W_base = W − scaling · B0 A0    W_eff = W_base + scaling · B A

    ``A`` and ``B`` start at ``A0`` and ``B0`` and train; all else is frozen. This class holds the base weight and the
    factors, and merges, saves and casts them. Subclasses compute; :class:`ProductLayer` is for a layer of one input.

    A subclass defines ``forward``, :meth:`_meta_like` and :meth:`to_plain`. One that holds its weight in another way,
    such as quantized, passes ``base=None`` and defines :meth:`base_matrix`, :meth:`_weight_spec` and
    :meth:`_init_from` too.

    Shapes: ``lora_A, lora_A0 (rank, in)``, ``lora_B, lora_B0 (out, rank)``, ``bias (out,)``, ``base_weight`` as the
    layer multiplies by it. A stack of weights ``(E, out, in)`` has factors ``(E, rank, in)`` and ``(E, out, rank)``.

    Args:
        base: an empty tensor for the base weight, in its shape, dtype and device.
        bias: an empty tensor for the bias, or None.
        shape: of the matrix or the stack, ``(…, out, in)``.
        window: the window, or the rule that finds it.
        kind: of the plain layer, see ``ipca.nn.layer_kinds``.
        alpha, form, dropout, adapter_dtype, tol, train, magnitude: as for :class:`ipca.nn.LinearPC`.
        device, dtype: of the factors, where ``base`` is None: the device, and the dtype that products are computed in.

    Raises:
        ValueError: an argument out of range, or a rank above ``min(out, in)``.
    """

    def __init__(
        self,
        base: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        window: Window,
        *,
        kind: str = "linear",
        alpha: float | None = None,
        form: str = "intact",
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        tol: float | str = "default",
        train: str = "both",
        magnitude: float | str = "sigma",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.matrix_shape = tuple(shape)
        *experts, self.out_features, self.in_features = shape
        self.requested_window, self.rank, self.kind = window, window.rank, kind
        self.alpha = float(self.rank if alpha is None else alpha)
        self.form, self.dropout, self.tol = form, float(dropout), tol
        self.trained, self.magnitude = train, magnitude
        check_options(form=form, dropout=self.dropout, alpha=self.alpha, train=train, magnitude=magnitude)
        d, one = min(shape[-2:]), tuple(shape[-2:])
        if self.rank > d:
            raise ValueError(f"rank {self.rank} is above the {d} singular values of a {one} weight; lower `rank`.")

        self.window: Window | None = None
        self.base_sha256: str | None = None
        self.svd_report: SVDReport | None = None
        self.certificate: InitCertificate | None = None
        self.subclass: Subclass | None = None
        self._disabled, self._disabled_blocks = False, 0
        self._merged: Tensor | None = None
        self.was_called = self.was_read = False

        if base is not None:
            device, dtype = base.device, base.dtype
            self.base_weight = nn.Parameter(base, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        adapter_dtype = adapter_dtype or default_adapter_dtype(dtype or torch.get_default_dtype())
        factor = torch.empty(0, dtype=adapter_dtype, device=device)
        self.lora_A = nn.Parameter(factor.new_empty(*experts, self.rank, self.in_features))
        self.lora_B = nn.Parameter(factor.new_empty(*experts, self.out_features, self.rank))
        self.register_buffer("lora_A0", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("lora_B0", torch.empty_like(self.lora_B, requires_grad=False))
        self.lora_A0: Tensor
        self.lora_B0: Tensor
        self.train_factors()

    def train_factors(self, trainable: bool = True) -> None:
        """Have the factors that :attr:`trained` names require gradients, and nothing else; or nothing at all."""
        self.lora_A.requires_grad_(trainable and self.trained != "B")
        self.lora_B.requires_grad_(trainable and self.trained != "A")

    def check_ready(self) -> None:
        """Raise RuntimeError where ``forward`` is not defined: no window yet, or training while merged."""
        name = type(self).__name__
        if self.window is None:
            raise RuntimeError(f"This {name} has no window yet: load a state dict with load_state_dict().")
        if self._merged is not None and not self._disabled and self.training and torch.is_grad_enabled():
            raise RuntimeError(f"A merged {name} cannot train: call unmerge() first, or eval().")

    # -- weights

    def held(self, name: str) -> Any:
        """``getattr(self, name)`` of a parameter or buffer, which nn.Module finds only after a failed lookup."""
        parameters = self._parameters
        if name in parameters:
            return parameters[name]
        return self._buffers[name] if name in self._buffers else getattr(self, name)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """``weight``, in the shape of ``base_weight``, as ``(…, out, in)``."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`as_matrix`."""
        return matrix

    def base_matrix(self) -> Tensor:
        """The base weight, ``W`` or ``W_res (…, out, in)``, in the dtype that products are computed in."""
        return self.as_matrix(self.base_weight)

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias, its own or that of a layer it holds."""
        return self.bias is not None

    @property
    def merged(self) -> bool:
        return self._merged is not None

    @property
    def is_disabled(self) -> bool:
        """Whether the layer computes the pretrained function at the moment, within :meth:`disabled`."""
        return self._disabled

    @property
    def is_plain(self) -> bool:
        """Whether ``forward`` is one product with a weight at the moment: merged, or intact and disabled."""
        return self.form == "intact" if self._disabled else self.merged

    @property
    def bypassed(self) -> bool:
        """Whether the weight has been read for a computation and the layer has never been called.

        Other implementations of LoRA change a layer's output, and so leave such a layer as it was. What runs under
        torch.compile counts for neither.
        """
        return self.was_read and not self.was_called

    @property
    def weight(self) -> Tensor:
        """``W_eff`` in the plain layer's shape, for code that reads a weight without calling the layer.

        It is what ``forward`` multiplies by when it is read (disabled, merged or neither). Its dtype, device and shape
        cost nothing; the product is computed where the weight takes part in a computation, and gradients reach the
        factors. Writing into it raises, see ``ipca.nn.lazy_weight``.

        While torch.compile traces, under a ``torch.func`` transform and where the layer is sharded or its parameters
        are exchanged for other tensors, it is computed at once.
        """
        own: Any = self._parameters  # what is read here for a dtype must not cost more than the lookup
        A, B = own.get("lora_A"), own.get("lora_B")
        lasting = type(A) is type(B) is type(own.get("base_weight", A)) is nn.Parameter
        if not lasting or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.computed_weight()
        disabled = self._disabled
        trains = not disabled and self._merged is None and (A.requires_grad or B.requires_grad)
        return make_lazy_weight(self, A, B, self._weight_spec(), disabled=disabled, trains=trains)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise_read_only()
        super().__setattr__(name, value)

    def computed_weight(self, *, disabled: bool | None = None) -> Tensor:
        """:attr:`weight` as a plain tensor, with gradients to the factors.

        Args:
            disabled: the pretrained weight, as within :meth:`disabled`; by default as the layer is at the moment.
        """
        disabled = self._disabled if disabled is None else disabled
        if self._merged is not None and not disabled:
            return self._merged
        base = self.base_matrix()
        if disabled and self.form == "intact":
            return self.as_weight(base)
        A, B = (self.lora_A0, self.lora_B0) if disabled else (self.lora_A, self.lora_B)
        factors = [(B, A)]
        if self.form == "intact":  # B A − B0 A0, as differences of factors: those of products lose a small change
            A0, B0 = part_like(self.lora_A0.to(A.dtype), A), part_like(self.lora_B0.to(B.dtype), B)
            factors = [(B, A - A0), (B - B0, A0)]
        with without_autocast(base):
            low = [part_like(E.to(base.dtype) @ D.to(base.dtype), base) for E, D in factors]
        return self.as_weight(base + self.scaling * reduce(torch.add, low))

    def _weight_spec(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """The shape, dtype and device of :attr:`weight`."""
        base = self._parameters["base_weight"]
        assert base is not None
        return base.shape, base.dtype, base.device

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """``W_eff (…, out, in)`` of the trained layer, added up in float64, in the weight's dtype, as a new tensor."""
        trained, frozen = (1, self.lora_B, self.lora_A), (-1, self.lora_B0, self.lora_A0)
        return self._base_plus(trained) if self.form == "residual" else self._base_plus(trained, frozen)

    @torch.no_grad()
    def pretrained_weight(self) -> Tensor:
        """The pretrained ``W (…, out, in)``, in the weight's dtype, as a new tensor (residual form: up to rounding)."""
        return self._base_plus((1, self.lora_B0, self.lora_A0)) if self.form == "residual" else self._base_plus()

    @torch.no_grad()
    def residual_weight(self) -> Tensor:
        """``W_res = W − scaling · B0 A0 (…, out, in)``, in the weight's dtype, as a new tensor."""
        return self._base_plus() if self.form == "residual" else self._base_plus((-1, self.lora_B0, self.lora_A0))

    def _base_plus(self, *terms: tuple[int, Tensor, Tensor]) -> Tensor:
        """``base_matrix + Σ sign · scaling · B A`` in float64, rounded once."""
        return add_low_rank(self.base_matrix(), [(sign * self.scaling, B, A) for sign, B, A in terms])

    # -- construction

    @classmethod
    def _meta_like(cls: type[Layer], plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> Layer:
        """A layer like ``plain`` on the meta device, without a window yet; TypeError for another kind of layer."""
        raise NotImplementedError

    @classmethod
    def from_layer(cls: type[Layer], plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> Layer:
        """A layer that computes what ``plain`` does, which is not changed; arguments and errors as for the class."""
        layer = cls._meta_like(plain, window, **options)
        layer._init_from(plain, layer._initial_factors(read_layer(plain, layer.kind)[0]))
        return layer

    @classmethod
    def from_factors(
        cls: type[Layer],
        plain: nn.Module,
        initial: InitialFactors,
        *,
        alpha: float | None = None,
        form: str = "intact",
        dropout: float = 0.0,
        train: str = "both",
        magnitude: float | str = "sigma",
    ) -> Layer:
        """As :meth:`from_layer`, from given initial factors: no SVD."""
        layer = cls._meta_like(
            plain,
            initial.window,
            alpha=alpha,
            form=form,
            dropout=dropout,
            adapter_dtype=initial.A0.dtype,
            train=train,
            magnitude=magnitude,
        )
        layer._init_from(plain, initial)
        return layer

    def _init_from(self, plain: nn.Module, initial: InitialFactors) -> None:
        """Take the weight, bias and mode of ``plain``, and the ``initial`` factors."""
        weight, bias = read_layer(plain, self.kind)
        self.base_weight = nn.Parameter(self._base_for(weight, initial), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._set_factors(initial)
        self.train(plain.training)

    def _set_factors(self, initial: InitialFactors) -> None:
        """Put the ``initial`` factors in place, without copying ``A0`` and ``B0``."""
        factors = initial.factors()
        self.lora_A, self.lora_B = nn.Parameter(factors["lora_A"]), nn.Parameter(factors["lora_B"])
        self.lora_A0, self.lora_B0 = factors["lora_A0"], factors["lora_B0"]
        self.train_factors()
        self._record_init(initial)

    def _record_init(self, initial: InitialFactors) -> None:
        self.window, self.base_sha256 = initial.window, initial.base_sha256
        self.svd_report, self.certificate = initial.svd, initial.certificate

    def _initial_factors(self, weight: Tensor, *, digest: str | None = None) -> InitialFactors:
        """The initial factors of this layer for the pretrained ``weight (…, out, in)``; the layer is not changed."""
        return initial_factors(
            weight,
            self.requested_window,
            scaling=self.scaling,
            form=self.form,
            adapter_dtype=self.lora_A.dtype,
            tol=self.tol,
            magnitude=self.magnitude,
            digest=digest,
        )

    def _base_for(self, weight: Tensor, initial: InitialFactors) -> Tensor:
        """The base weight for ``weight (…, out, in)``; in the intact form its own memory, where the layout allows."""
        base = frozen_weight(weight, initial.A0, initial.B0, scaling=self.scaling, form=self.form)
        return self.as_weight(base).contiguous()

    def to_plain(self, *, base: bool = False) -> nn.Module:
        """A plain layer of the original type with the effective weight; shares no memory with this one.

        Args:
            base: with the pretrained weight instead.
        """
        raise NotImplementedError

    # -- merging, disabling

    def merge(self) -> None:
        """Compute ``W_eff`` once and multiply by it only. The base weight stays beside it, for :meth:`unmerge`.

        Raises:
            ValueError: as :meth:`check_mergeable`.
        """
        if self._merged is None:
            self.check_mergeable()
            self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        with torch.inference_mode(False):  # what is made there could not be differentiated through later
            self._merged = self.as_weight(self.effective_weight()).contiguous()

    @torch.no_grad()
    def check_mergeable(self) -> None:
        """Raise ValueError where ``W_eff`` would hold NaN or Inf; it is computed only where its bound does not tell.

        ``|W_eff| ≤ max|W_base| + scaling · Σ max_i‖B_i‖ · max_j‖A_j‖`` with rows ``B_i`` and columns ``A_j``.
        """
        if self.lora_A.is_meta:
            return
        base, A, B, A0, B0 = map(full, (self.base_matrix(), self.lora_A, self.lora_B, self.lora_A0, self.lora_B0))
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(
                "its factors hold NaN or Inf, which merging would put into the weight; load an adapter from before, "
                "or unload with merge=False."
            )
        pairs = [(B, A)] if self.form == "residual" else [(B, A), (B0, A0)]
        reach = max(map(abs, base.aminmax())).item()
        for E, D in pairs:
            E, D = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (E, D))
            reach += self.scaling * (E.norm(dim=-1).max() * D.norm(dim=-2).max()).item()
        if reach <= torch.finfo(base.dtype).max / 2 or self.effective_weight().isfinite().all():
            return
        raise ValueError(
            f"the merged weight would hold Inf: it reaches beyond {torch.finfo(base.dtype).max:.3g}, the largest "
            f"number of {base.dtype}; cast the model to a wider dtype first, or unload with merge=False."
        )

    def unmerge(self) -> None:
        """Undo :meth:`merge`, to the bit."""
        self._merged = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute the pretrained function within the block (residual form: up to rounding), in every thread.

        Blocks may overlap in any order, as those of two threads or generators do: the last that ends counts.
        """
        self._count_disabled_blocks(1)
        try:
            yield
        finally:
            self._count_disabled_blocks(-1)

    def _count_disabled_blocks(self, change: int) -> None:
        with nullcontext() if torch.compiler.is_compiling() else _counting_blocks:  # torch.compile traces no lock
            self._disabled_blocks += change
            self._disabled = self._disabled_blocks > 0

    # -- printing, saving, loading, casting

    def extra_repr(self) -> str:
        where = repr(self.requested_window.text)
        if self.window is not None:
            where = f"[{self.window.index}, {self.window.index + self.rank})"
            where += " of the inputs" if self.window.basis == "inputs" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, "
            f"window={where}, rank={self.rank}, alpha={self.alpha:g}, form={self.form}"
            + (f", dropout={self.dropout:g}" if self.dropout else "")
            + (f", train={self.trained}" if self.trained != "both" else "")
            + (", merged" if self.merged else "")
            + (", disabled" if self.is_disabled else "")
        )

    def _record(self) -> LayerRecord:
        start, basis = (None, "weight") if self.window is None else (self.window.index, self.window.basis)
        settings = (self.rank, self.alpha, self.form, start, self.base_sha256, basis, self.magnitude, self.trained)
        return LayerRecord(*settings)

    def get_extra_state(self) -> Tensor:
        return encode_extra_state(self._record())

    def set_extra_state(self, state: Tensor) -> None:
        record = decode_extra_state(state)
        self.window = None if record.start is None else Window(record.start, self.rank, record.basis)
        self.base_sha256, self.magnitude = record.base_sha256, record.magnitude
        self.svd_report = self.certificate = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *lists: Any
    ) -> None:
        initial = None
        try:
            if prefix + "weight" in state_dict and prefix + "base_weight" not in state_dict:
                assign = local_metadata.get("assign_to_params_buffers", False)
                state_dict, initial = self._state_of_plain(state_dict, prefix, assign)
            else:
                self._check_state(state_dict, prefix)
        except (TypeError, ValueError) as error:
            lists[-1].append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        self.unmerge()
        drop_kept_pair(self.lora_A0)  # load_state_dict may swap it for another tensor
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        if initial is not None and not self.lora_A.is_meta:
            self._record_init(initial)

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise ValueError where a state dict contradicts this layer, or has a base weight without factors.

        Strict loading reports other missing keys.
        """
        if prefix + "base_weight" in state_dict:
            missing = [name for name in _FACTORS if prefix + name not in state_dict]
            if missing:
                raise ValueError(f"the state dict holds base_weight, which means nothing without {', '.join(missing)}.")
        if prefix + "_extra_state" in state_dict:
            check_extra_state(self._record(), state_dict[prefix + "_extra_state"])
        elif any(self._differs(name, state_dict.get(prefix + name)) for name in ("lora_A0", "lora_B0")):
            raise ValueError(
                "the state dict holds the frozen factors of another window and no _extra_state, which says of which; "
                "load a whole state dict, or an adapter with ipca.load_adapter."
            )

    @torch.no_grad()
    def _differs(self, name: str, other: Tensor | None) -> bool:
        """Whether the buffer ``name`` has values, and ``other`` differs from it by more than a cast to 16 bits."""
        own: Tensor = self._buffers[name]  # type: ignore[assignment]
        if self.window is None or other is None or other.shape != own.shape:  # PyTorch reports another shape
            return False
        if any(each.is_meta or is_sharded(each) for each in (own, other)):
            return False
        return bool((other.to(own) - own).norm() > 0.05 * own.norm())

    def _state_of_plain(
        self, state_dict: dict[str, Any], prefix: str, assign: bool
    ) -> tuple[dict[str, Any], InitialFactors]:
        """The state dict that this layer would have on the plain layer's ``weight``, and its initial factors.

        Args:
            assign: as for ``load_state_dict``; without it the weight is cast to the dtype of ``base_weight``.
        """
        plain, base = state_dict[prefix + "weight"], self.base_weight
        weight = to_matrix(self.kind, plain)
        if weight.shape != self.base_matrix().shape:
            raise ValueError(f"the weight has shape {tuple(plain.shape)}, this layer {tuple(base.shape)}.")
        if not assign:
            weight = weight.to(dtype=base.dtype, device=weight.device if base.is_meta else base.device)
        initial = self._initial_factors(weight)
        own = {
            **initial.factors(),
            "base_weight": self._base_for(weight, initial),
            "_extra_state": self.get_extra_state(),
        }
        rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        return {**rest, **{prefix + name: value for name, value in own.items()}}, initial

    def _apply(self, fn: Any, recurse: bool = True) -> WindowLayer:
        """Move or cast. Casting the residual form rounds its parts anew, so that they still add up to ``W``."""
        merged = self.merged
        self.unmerge()
        base = self.base_matrix().detach() if self.form == "residual" else None
        A0, B0 = self.lora_A0, self.lora_B0
        super()._apply(fn, recurse)
        if base is not None:
            self._reround(base, A0, B0)
        if merged:
            self._merge()
        return self

    @torch.no_grad()
    def _reround(self, base: Tensor, A0: Tensor, B0: Tensor) -> None:
        """After a cast of the residual form, recompute ``W − scaling · B0 A0`` for the factors' new rounding.

        ``base (…, out, in)``, ``A0`` and ``B0`` are those before the cast; their sum is rounded once.
        """
        new = self.base_weight
        if base.is_meta or new.is_meta or (self.lora_A0.dtype == A0.dtype and new.dtype == base.dtype):
            return
        change = [(self.scaling, B0, A0), (-self.scaling, self.lora_B0.to(B0.device), self.lora_A0.to(A0.device))]
        new.copy_(part_like(self.as_weight(add_low_rank(base, change, dtype=new.dtype)), new))
        self.certificate = None


class ProductLayer(WindowLayer):
    """``y = base_product(x) + scaling · low_rank(z, D, E)``, ``z = dropout(x)``, with ``D, E`` of ``ipca.ops.pair``.

    So the change is 0 before training, and keeps its digits where the factors have moved little. Subclasses define
    :meth:`product` and :meth:`low_rank`; one that computes them otherwise defines :meth:`window_product`, one that
    holds its weight in another way :meth:`base_product`.
    """

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer with ``weight``, in the shape of ``base_weight``, applied to ``x``, bias included."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The plain layer with the weight ``B A`` and no bias applied to ``x``, without forming ``B A``."""
        raise NotImplementedError

    def base_product(self, x: Tensor) -> Tensor:
        """The plain layer with the base weight applied to ``x``, bias included."""
        return self.product(x, self.base_weight)

    def window_product(self, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        """The output for the factors ``A, B``."""
        y, z = self.base_product(x), F.dropout(x, dropout) if dropout else x
        A0, B0 = (self.lora_A0, self.lora_B0) if self.form == "intact" else (None, None)
        A, B, A0, B0, scaling = balanced_pair(A, B, A0, B0, self.scaling, z)
        return y + (scaling * self.low_rank(z, *one_pair(A, B, A0, B0))).to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.check_ready()
        if not torch.compiler.is_compiling() and not self.was_called:  # a guard on it would have all compiled twice
            self.was_called = True
        if self._merged is not None and not self._disabled:
            return self.product(x, self._merged)
        if self._disabled:
            if self.form == "intact":
                return self.base_product(x)
            return self.window_product(x, self.lora_A0, self.lora_B0, 0.0)
        return self.window_product(x, self.held("lora_A"), self.held("lora_B"), self.dropout if self.training else 0.0)
