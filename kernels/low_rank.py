"""The kernels of the low-rank products, under the names that ``ipca.ops.torch_kernels`` gives them in plain PyTorch."""

from ipca.kernels.outer import outer
from ipca.kernels.products import fuses, products
from ipca.kernels.project import project

__all__ = ["fuses", "outer", "products", "project"]
