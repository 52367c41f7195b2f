"""Linear probes: multinomial logistic regression on standardized features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 0.2
"""Of half the squared weights, against the mean cross-entropy."""


@dataclass(frozen=True)
class Probe:
    """``features @ weight.T + bias``: weight ``(classes, width)``, bias ``(classes,)``, float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> Probe:
        """The probe of ``features (M, width)`` and ``labels (M,)``, on the features' device.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("probes need scikit-learn; run: pip install -c constraints.txt scikit-learn") from error
        x = features.double().cpu()
        center, spread = x.mean(0), x.std(0).clamp_min(1e-6)
        x = (x - center) / spread
        found = LogisticRegression(C=1 / (PENALTY * len(x)), max_iter=1000).fit(x.numpy(), labels.numpy())
        weight = torch.from_numpy(found.coef_) / spread
        bias = torch.from_numpy(found.intercept_) - weight @ center
        return cls(weight.to(features), bias.to(features))

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(M, classes)``."""
        return F.linear(features, self.weight, self.bias)
