"""What torch.compile makes of the op on a GPU, written for a pretended one."""

import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F

from bench.offline import _start
from ipca.ops import pc_linear, set_backend

TOKENS, K, N, R = (4, 2048), 4096, 11008, 16
M = math.prod(TOKENS)

pytestmark = pytest.mark.slow


def forward_and_backward(backend, dropout):
    """The code of a layer behind a SiLU and a residual, and of its backward behind the gradients of both."""
    from ipca.ops import cuda
    from tests.helpers.pretend_gpu import fake, inductor_code, pretend

    pretend()
    set_backend(backend)
    x, y, h, weight = fake(*TOKENS, K), fake(*TOKENS, N), fake(*TOKENS, R), fake(N, K)
    A, B = fake(R, K, dtype=torch.float32), fake(N, R, dtype=torch.float32)
    seed = fake(1, dtype=torch.int64) if dropout else None

    def forward(x, residual, weight, A, B):
        return F.silu(pc_linear(F.silu(x) + residual, weight, A, B, scaling=0.7, dropout=dropout))

    def backward(dy, y, residual, x, h, weight, A, B, seed):
        dy = torch.ops.aten.silu_backward(dy, y) + residual
        tensors, needs = (dy, x, h, weight, A, B, None, None, None, seed), [True, False, True, True, False]
        dx, *rest = cuda.pc_linear_backward_op(*tensors, 0.7, dropout, backend, cuda.BUILD, needs)
        return torch.ops.aten.silu_backward(dx, x), *rest

    return inductor_code(forward, x, x, weight, A, B), inductor_code(backward, y, y, y, x, h, weight, A, B, seed)


@pytest.fixture(scope="module", params=[("triton", 0.0), ("triton", 0.1), ("addmm", 0.0), ("addmm", 0.1)], ids=str)
def written(request, tmp_path_factory):
    """Backend, and the code of forward and backward."""
    start = str(tmp_path_factory.mktemp("triton")), ""
    with ProcessPoolExecutor(1, get_context("spawn"), _start, start) as pool:
        return request.param[0], *pool.submit(forward_and_backward, *request.param).result()


def buffers(code, *shape):
    """How many buffers with as many entries as ``shape`` are made."""
    made = re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\)", code)
    return sum(math.prod(map(int, sizes.strip(", ").split(", "))) == math.prod(shape) for sizes in made)


def test_what_the_layer_reads_is_written_once(written):
    _, forward, backward = written
    assert buffers(forward, M, K) == 1  # silu(x) + residual, read by two kernels
    assert buffers(backward, M, N) == 1  # dy


def test_a_matrix_product_is_not_added_to_a_copy(written):
    """``addmm_`` in a graph is one out of place, whose output starts as a copy of the low-rank part."""
    backend, *codes = written
    for code in codes:
        assert ("extern_kernels.mm(" in code) == (backend == "addmm")
        assert "extern_kernels.addmm(" not in code


def test_every_kernel_is_in_the_graph_with_scalars_of_a_known_type(written):
    backend, forward, backward = written
    launched = set(re.findall(r"\b_(\w+)_kernel_\d+\.run\(", forward + backward))
    assert launched == {"project", "products", "outer", "add_up"} | ({"linear"} if backend == "triton" else set())
    # float64 up to PyTorch 2.13; the kernels are compiled with both in tests/kernels/test_compile.py
    assert set(re.findall(r"'(?:scaling|keep_scale)': '(\w+)'", forward + backward)) <= {"fp32", "fp64"}
    assert "'scaling': 'fp" in forward
