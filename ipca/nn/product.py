"""ProductLayer: a WindowLayer of one input, whose output is a product with the kept weight and a low-rank part."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ipca.nn.window_layer import WindowLayer


class ProductLayer(WindowLayer):
    """``y = base_product(x) + scaling · (low_rank(z, A, B) − low_rank(z, A0, B0))``, ``z = dropout(x)``.

    The last term is the intact form's. It is computed by the arithmetic of the one before it, so that before training
    their difference is exactly 0. Subclasses define :meth:`product` and :meth:`low_rank`; one that fuses them defines
    :meth:`window_product`, one that keeps its weight in another way :meth:`base_product`.
    """

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the plain layer with ``weight``, in the shape of ``base_weight``, computes of ``x``, bias included."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What the plain layer with the weight ``B A`` and no bias computes of ``x``, without forming ``B A``."""
        raise NotImplementedError

    def base_product(self, x: Tensor) -> Tensor:
        """What the plain layer with the kept weight computes of ``x``, bias included."""
        return self.product(x, self.base_weight)

    def window_product(self, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        """The whole output for the factors ``A, B``."""
        y, z = self.base_product(x), F.dropout(x, dropout) if dropout else x
        low = self.low_rank(z, A, B)
        if self.form == "intact":
            low = low - self.low_rank(z, self.lora_A0, self.lora_B0)
        return y + (self.scaling * low).to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.check_ready()
        if self._merged is not None and not self._disabled:
            return self.product(x, self._merged)
        if self._disabled:
            if self.form == "intact":
                return self.base_product(x)
            return self.window_product(x, self.lora_A0, self.lora_B0, 0.0)
        return self.window_product(x, self.lora_A, self.lora_B, self.dropout if self.training else 0.0)
