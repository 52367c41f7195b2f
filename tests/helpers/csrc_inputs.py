"""Calls of the CUDA kernels on a CPU: their inputs, and how they run.

The kernels are compiled for the CPU with tests/csrc/host_shim.h. Most calls run with the small tiles of csrc/sizes.h:
panels of 8 columns, Cholesky blocks of 4, tiles of 6 and 16 rows, warps of 4 threads. Sizes here are odd ones around
those.
"""

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC, HOST = ROOT / "csrc", ROOT / "tests" / "csrc"
FLAGS = ["-std=c++17", "-O1", "-DIPCA_HOST", "-Wno-unknown-pragmas"]
SMALL = ["-DIPCA_SMALL", "-fsanitize=thread"]
FULL = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
RACE = 66
"""The exit status of a program in which the thread sanitizer found something."""


@dataclass
class Call:
    """One call of csrc/launch.h: ``numbers`` as host_main.cpp wants them, ``arrays`` that it reads and writes."""

    name: str
    operation: int
    numbers: list[int]
    arrays: list[torch.Tensor]

    @property
    def dtype(self):
        return self.arrays[0].dtype


def build(csrc, out, *flags):
    """Compile ``csrc`` for the CPU into the program ``out``."""
    command = ["g++", *FLAGS, *flags, f"-I{csrc}", f"-I{HOST}", str(HOST / "host_main.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def run(program, calls, folder, **environment):
    """Exit status, what the program said, and for each call its arrays afterward (none if it did not end well)."""
    (folder / "in").write_bytes(b"".join(encoded(call) for call in calls))
    command = [program, folder / "in", folder / "out"]
    try:
        status, said = ended(command, environment)
        if "unexpected memory mapping" in said and shutil.which("setarch"):  # the sanitizer and a randomized layout
            status, said = ended(["setarch", "-R", *command], environment)
    except subprocess.TimeoutExpired:
        return None, "hangs: some threads wait where others do not", []
    data = (folder / "out").read_bytes() if (folder / "out").exists() else b""
    whole = sum(array.nbytes for call in calls for array in call.arrays) == len(data)
    return status, said, decoded(data, calls) if whole else []


def ended(command, environment):
    # The first race ends it: it may leave threads waiting for each other.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return done.returncode, done.stdout + done.stderr


def encoded(call):
    head = struct.pack("5q", call.operation, call.dtype.itemsize, len(call.numbers), len(call.arrays), 0)
    arrays = b"".join(struct.pack("q", array.nbytes) + array.numpy().tobytes() for array in call.arrays)
    return head + struct.pack(f"{len(call.numbers)}q", *call.numbers) + arrays


def decoded(data, calls):
    found = []
    for call in calls:
        found.append([])
        for array in call.arrays:
            now, data = data[: array.nbytes], data[array.nbytes :]
            found[-1].append(torch.frombuffer(bytearray(now), dtype=array.dtype).reshape(array.shape))
    return found


def ldlt_call(name, n, first, k, dtype, batch=1, edit=None):
    """Columns ``[first, first + k)`` of ``batch`` matrices ``(n, n)``, NaN above the diagonal; growth is a view."""
    A = torch.randn(batch, n, n, dtype=torch.float64)
    A = A + A.mT + 2 * n**0.5 * torch.diag_embed(torch.randn(batch, n, dtype=torch.float64).sign())
    if edit:
        edit(A)
    A.masked_fill_(torch.ones(n, n).triu(1).bool(), float("nan"))
    growth = torch.rand(batch, n, 3, dtype=torch.float64)
    tiny = 1e-10 * torch.arange(1, batch + 1)
    numbers = [first * n + first, n * n, n, 3 * first + 1, 3 * n, 3, batch, n - first, k]
    arrays = [A.to(dtype), growth.to(dtype), torch.arange(batch), tiny.to(dtype)]
    return Call(name, 0, numbers, arrays)


def cholesky_call(name, X, padding=0, dtype=None):
    """``XᵀX`` for ``X (batch, m, p)``, as a view into something wider; above the diagonal it is NaN."""
    G = X.mT @ X
    batch, p, _ = G.shape
    wide = torch.full((batch, p, p + padding), float("nan"), dtype=G.dtype)
    wide[..., :p] = G.masked_fill(torch.ones(p, p).triu(1).bool(), float("nan"))
    arrays = [wide, torch.full_like(G, float("nan")), torch.full_like(G[:, 0, 0], float("nan"))]
    return Call(name, 1, [0, p * (p + padding), p + padding, batch, p], [array.to(dtype) for array in arrays])


def lanczos_call(name, n, steps, step, dtype, chains=1, edit=None):
    """``basis (steps + 1, chains, n)`` as a view into something wider, orthonormal up to ``step``; NaN behind it."""
    basis = torch.full((steps + 1, chains, n + 1), float("nan"), dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(chains, n, min(step + 1, n), dtype=torch.float64)).Q
    basis[: step + 1, :, :n] = Q.permute(2, 0, 1)
    product = torch.randn(chains, n + 2, dtype=torch.float64)
    if edit:
        edit(basis, product)
    alpha, beta = (torch.full((chains, steps), float("nan"), dtype=torch.float64) for _ in range(2))
    numbers = [0, chains * (n + 1), n + 1, 0, n + 2, step, steps, step, steps, chains, n, step]
    return Call(name, 2, numbers, [array.to(dtype) for array in (basis, product, alpha, beta)])


def zero_pivots(A):
    """One pivot is 0, and one is positive and too small to count."""
    A[:, [2, 5]] = A[:, :, [2, 5]] = 0
    A[:, 5, 5] = 1e-12


def exhausted(basis, product):
    product[:] = 0
    product[:, :-2] = (basis[:3, :, :-1] * torch.tensor([3.0, -2.0, 0.5], dtype=basis.dtype)[:, None, None]).sum(0)


def nearly_exhausted(basis, product):
    noise = product[:, :-2].clone()
    exhausted(basis, product)
    product[:, :-2] += 1e-4 * noise


def full_size_cases():
    """Calls for the tiles that a GPU gets: panels of 64, blocks of 32, tiles of 64 and 128 rows, warps of 32."""
    torch.manual_seed(1)
    X = torch.randn(2, 300, 200, dtype=torch.float64)
    return [
        ldlt_call("a whole panel", 203, 64, 64, torch.float64, batch=2),
        ldlt_call("a narrow panel", 101, 0, 37, torch.float32),
        ldlt_call("zero pivots", 64, 0, 64, torch.float64, edit=zero_pivots),
        cholesky_call("seven blocks", X, 0, torch.float64),
        cholesky_call("three blocks and a row", X[..., :97], 1, torch.float32),
        cholesky_call("rank 40", X[..., :40] @ torch.randn(2, 40, 70, dtype=torch.float64), 0, torch.float64),
        lanczos_call("many vectors", 1003, 40, 38, torch.float64, chains=2),
        lanczos_call("in float32", 1003, 40, 17, torch.float32, edit=exhausted),
    ]


def cases():
    """Calls for the small tiles; the same in every process."""
    torch.manual_seed(0)
    calls = []
    for dtype in (torch.float64, torch.float32):
        calls += [
            ldlt_call("a whole panel and odd rows below", 23, 0, 8, dtype),
            ldlt_call("the middle of a batch", 30, 8, 8, dtype, batch=3),
            ldlt_call("a narrow panel, rows for two tiles", 16, 3, 5, dtype, batch=2),
            ldlt_call("one column", 9, 0, 1, dtype),
            ldlt_call("no rows below", 14, 8, 6, dtype, batch=3),
            ldlt_call("zero pivots", 15, 0, 8, dtype, batch=3, edit=zero_pivots),
        ]
        X = torch.randn(3, 40, 21, dtype=torch.float64)
        zero, deficient = X.clone(), torch.randn(2, 40, 4, dtype=torch.float64) @ torch.randn(2, 4, 18).double()
        zero[:, :, [0, 7, 20]] = 0
        deficient[1] = X[0, :, :18]
        calls += [
            cholesky_call("scaled columns", X * torch.logspace(-3, 3, 21, dtype=torch.float64), 3, dtype),
            cholesky_call("one block", X[..., :4], 0, dtype),
            cholesky_call("one column", X[:1, :, :1], 0, dtype),
            cholesky_call("more rows than a tile", X[..., :17], 1, dtype),
            cholesky_call("zero columns", zero, 0, dtype),
            cholesky_call("rank 4, beside full rank", deficient, 0, dtype),
            cholesky_call("not finite", X.clone().index_fill_(2, torch.tensor([6]), float("inf")), 0, dtype),
        ]
        calls += [
            lanczos_call("the first step", 13, 4, 0, dtype, chains=3),
            lanczos_call("the last step", 37, 7, 6, dtype, chains=3),
            lanczos_call("shorter than a block", 5, 4, 3, dtype),
            lanczos_call("an exhausted space", 17, 4, 2, dtype, chains=2, edit=exhausted),
            lanczos_call("a nearly exhausted space", 17, 4, 2, dtype, chains=2, edit=nearly_exhausted),
        ]
    return calls


def views(call, arrays):
    """The tensors that :mod:`ipca.svd.inner_loops` takes, of the call's arrays."""
    numbers, first, second = call.numbers, arrays[0], arrays[1]
    if call.operation == 0:
        _, _, n, _, _, _, _, rows, k = numbers
        begin = n - rows
        return first[:, begin:, begin : begin + k], second[:, begin:, 1], arrays[2], arrays[3]
    if call.operation == 1:
        return (first[..., : numbers[4]],)
    return first[..., :-1], second[:, :-2], arrays[2], arrays[3], numbers[11]
