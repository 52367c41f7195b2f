"""Every baseline against its source on a small case; writes bench/results/baseline_checks.csv.

    python -m bench.baseline_checks

One layer 12 × 20 in float32, rank 3, ``alpha = 6``, five steps of SGD on a regression; what is compared is the weight
that the trained layer computes with, ``f(I) − f(0)``, unless a check says otherwise. The source is PEFT in stock usage,
``get_peft_model`` and the documented calls, or the paper's formula in float64 NumPy, its gradients written by hand. The
difference is ``max |W'_ours − W'_source| / max |W'_source|``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from bench.rows import FACTS, RESULTS, Row, append_rows, facts
from ipca.lab import baselines
from ipca.model import AdapterSettings
from ipca.svd import SpectralCache
from studies.frontier.arms import Tuned
from studies.frontier.design import Arm

COLUMNS = ("baseline", "source", "compared", "difference", "tolerance", *FACTS)
PATH = RESULTS / "baseline_checks.csv"
OUT, IN, RANK, ALPHA, RATE, STEPS = 12, 20, 3, 6.0, 0.05, 5
SCALING = ALPHA / RANK
SCALES = (0.0, 0.25, 0.5, 1.0, 1.25)
Array = np.ndarray[Any, np.dtype[np.float64]]
Step = Callable[[Array], tuple[Array, ...]]


class Check(NamedTuple):
    """A comparison: ``difference()`` must not be above ``tolerance``."""

    baseline: str
    source: str
    compared: str
    tolerance: float
    difference: Callable[[], float]


def base() -> Any:
    """The pretrained model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT))


def data() -> tuple[Tensor, Tensor]:
    """Inputs ``(64, in)`` of which some directions are used more than others, and targets ``(64, out)``."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.1, 1.5, IN)
    return torch.randn(64, IN, generator=generator) * spread, torch.randn(64, OUT, generator=generator)


def ours(method: str, alpha: float = ALPHA, **settings: Any) -> Any:
    """The model adapted by name."""
    chosen = AdapterSettings(rank=RANK, alpha=alpha, targets=["0"], **settings)
    return baselines.apply(base(), method, chosen, calibration=[data()[0]])


def stock(**options: Any) -> Any:
    """A PeftModel with PEFT's LoRA."""
    return in_peft(peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"], **options}))


def in_peft(config: Any) -> Any:
    """A PeftModel, of CorDA after PEFT's preprocessing."""
    model = base()
    torch.manual_seed(0)
    if getattr(config, "corda_config", None) is not None:
        preprocess_corda(model, config, run_model=lambda: model(data()[0]))
    return peft.get_peft_model(model, config)


def train(model: Any, penalty: Callable[[], Any] = lambda: 0.0) -> Any:
    """Five steps of SGD on ``½ mean ‖f(x) − y‖²``, plus ``penalty()``."""
    x, y = data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean() + penalty()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def weight(model: Any) -> Array:
    """``W' (out, in)`` that the model computes with."""
    return numpy(model(torch.eye(IN)) - model(torch.zeros(1, IN))).T


def numpy(tensor: Tensor) -> Array:
    """The values in float64."""
    return tensor.detach().double().numpy()


def apart(found: Array, expected: Array) -> float:
    """The largest difference of an entry, relative to the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def same_training(method: str, config: Callable[[], Any], **settings: Any) -> Callable[[], float]:
    """The difference of the trained weights of a method and of PEFT in stock usage."""

    def difference() -> float:
        model, theirs = ours(method, **settings), config()
        if method == "lora":
            theirs.base_model.model[0].lora_A["default"].weight.data.copy_(model[0].lora_A)
        kasa = method == "kasa"
        train(model, lambda: baselines.penalty(model))
        train(theirs, lambda: theirs._get_kasa_loss() if kasa else 0.0)
        return apart(weight(model), weight(theirs))

    return difference


# -- the papers' formulas, in float64 NumPy


def start() -> tuple[Array, Array, Array, Array]:
    """``W`` and its singular value decomposition ``U, S, Vh``."""
    W = numpy(base()[0].weight)
    return W, *np.linalg.svd(W, full_matrices=False)


def gradient(W: Array) -> Array:
    """``∂ loss / ∂ W`` of the layer with the weight ``W``."""
    x, y = map(numpy, data())
    return (x @ W.T + numpy(base()[0].bias) - y).T @ x / len(x)


def low_rank(W: Array, B: Array, A: Array, *, trains: str = "AB") -> Array:
    """SGD on the factors of ``W + s (B A − B0 A0)``."""
    W_res = W - SCALING * B @ A
    for _ in range(STEPS):
        G = SCALING * gradient(W_res + SCALING * B @ A)
        dA, dB = B.T @ G, G @ A.T
        A = A - RATE * dA * ("A" in trains)
        B = B - RATE * dB * ("B" in trains)
    return W_res + SCALING * B @ A


def split(U: Array, S: Array, Vh: Array) -> tuple[Array, Array]:
    """``B0 = U √(S / s)``, ``A0 = √(S / s) Vh``."""
    root = np.sqrt(S / SCALING)
    return U * root, root[:, None] * Vh


def pissa() -> float:
    """The leading components split into the factors, both trained."""
    W, U, S, Vh = start()
    return apart(weight(train(ours("principal"))), low_rank(W, *split(U[:, :RANK], S[:RANK], Vh[:RANK])))


def milora() -> float:
    """The smallest components, likewise."""
    W, U, S, Vh = start()
    return apart(weight(train(ours("minor"))), low_rank(W, *split(U[:, -RANK:], S[-RANK:], Vh[-RANK:])))


def mica() -> float:
    """``B`` the smallest left singular vectors, frozen; ``A`` from 0."""
    W, U, _, _ = start()
    return apart(weight(train(ours("mica"))), low_rank(W, U[:, -RANK:], np.zeros((RANK, IN)), trains="A"))


def lora_null() -> float:
    """The input's left singular vectors of the smallest singular values, and the SVD of ``W`` projected on them."""
    N = np.linalg.svd(numpy(data()[0]).T)[0][:, -RANK:]
    W = start()[0]
    U, S, Vh = np.linalg.svd(W @ N @ N.T, full_matrices=False)
    return apart(weight(train(ours("lora-null"))), low_rank(W, *split(U[:, :RANK], S[:RANK], Vh[:RANK])))


def corda(method: str) -> float:
    """``W C = U S Vᵀ``, ``W = U S (Vᵀ C⁻¹)``, with 1 % of the mean variance added to the covariance."""
    x, W = numpy(data()[0]), start()[0]
    C = x.T @ x / x.max() ** 2
    C += 0.01 * np.diag(C).mean() * np.eye(IN)
    U, S, Vh = np.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(None, RANK) if method == "corda-ipm" else slice(-RANK, None)
    B, A = split(U[:, chosen], S[chosen], (Vh @ np.linalg.inv(C))[chosen])
    return apart(weight(train(ours(method))), low_rank(W, B, A))


def oplora() -> float:
    """``W + s P_L B A P_R``, from the ``A`` that ours draws and ``B = 0``."""
    model = ours("oplora")
    (W, U, _, Vh), A = start(), numpy(model[0].parametrizations.lora_A.original)
    B = np.zeros((OUT, RANK))
    left, right = np.eye(OUT) - U[:, :RANK] @ U[:, :RANK].T, np.eye(IN) - Vh[:RANK].T @ Vh[:RANK]
    moved = W
    for _ in range(STEPS):
        G = SCALING * left @ gradient(moved) @ right
        A, B = A - RATE * B.T @ G, B - RATE * G @ A.T
        moved = W + SCALING * left @ B @ A @ right
    return apart(weight(train(model)), moved)


def oplora_keeps() -> float:
    """``‖U_kᵀ ΔW‖`` and ``‖ΔW V_k‖`` as shares of ``‖ΔW‖``."""
    W, U, _, Vh = start()
    change = weight(train(ours("oplora"))) - W
    kept = (U[:, :RANK].T @ change, change @ Vh[:RANK].T)
    return float(max(np.linalg.norm(each) for each in kept) / np.linalg.norm(change))


def kasa() -> float:
    """``s B diag(d) A`` beside the cut weight, from the ``A`` and ``d`` that PEFT draws, with both regularizers."""
    model = ours("kasa")
    layer = model[0]
    _, U, S, Vh = start()
    W = (U[:, :-RANK] * S[:-RANK]) @ Vh[:-RANK]
    A, d = numpy(layer.lora_A["default"].weight), numpy(layer.lora_diag["default"])
    B, one, beta, gamma = np.zeros((OUT, RANK)), np.eye(RANK), 1e-4, 1e-3
    for _ in range(STEPS):
        G = SCALING * gradient(W + SCALING * (B * d) @ A)
        of_A, of_B = A @ A.T - one, B.T @ B - one
        dA = (B * d).T @ G + gamma * 2 * of_A @ A / np.linalg.norm(of_A)
        dB = G @ A.T * d + gamma * 2 * B @ of_B / np.linalg.norm(of_B)
        dd = np.diag(B.T @ G @ A.T) + 2 * beta * d
        A, B, d = A - RATE * dA, B - RATE * dB, d - RATE * dd
    return apart(weight(train(model, lambda: baselines.penalty(model))), W + SCALING * (B * d) @ A)


def osf() -> float:
    """The lower half of the components, gradients of ``U`` and ``V`` projected off the upper half."""
    _, U, S, Vh = start()
    k = min(OUT, IN) // 2
    left, right = np.eye(OUT) - U[:, :k] @ U[:, :k].T, np.eye(IN) - Vh[:k].T @ Vh[:k]
    high, (U, S, Vh) = (U[:, :k] * S[:k]) @ Vh[:k], (U[:, k:], S[k:], Vh[k:])
    for _ in range(STEPS):
        G = gradient(high + (U * S) @ Vh)
        dU, dS, dV = left @ (G @ Vh.T * S), np.diag(U.T @ G @ Vh.T), S[:, None] * (U.T @ G) @ right
        U, S, Vh = U - RATE * dU, S - RATE * dS, Vh - RATE * dV
    return apart(weight(train(ours("osf"))), high + (U * S) @ Vh)


def oft() -> float:
    """``W Rᵀ``, ``R = (I − Q) (I + Q)⁻¹`` of the trained skew-symmetric blocks ``Q``."""
    model = train(ours("oft"))
    module = model[0].oft_R["default"]
    size, one = module.block_size, np.eye(module.block_size)
    R = np.zeros((IN, IN))
    for i, entries in enumerate(numpy(module.weight)):
        Q = np.zeros((size, size))
        Q[np.triu_indices(size, 1)] = entries
        Q -= Q.T
        part = slice(i * size, (i + 1) * size)
        R[part, part] = (one - Q) @ np.linalg.inv(one + Q)
    return apart(weight(model), start()[0] @ R.T)


def oft_keeps() -> float:
    """``W Wᵀ``, the angles between neurons and their lengths, before and after."""
    W, trained = start()[0], weight(train(ours("oft")))
    return apart(trained @ trained.T, W @ W.T)


def full() -> float:
    """Gradient descent on ``W``."""
    W = start()[0]
    for _ in range(STEPS):
        W = W - RATE * gradient(W)
    return apart(weight(train(ours("full"))), W)


def pulled() -> float:
    """Adam's step, then ``W ← W + rate · pull · (W0 − W)``."""
    rate, pull, (x, y) = 1e-2, 10.0, data()
    with tempfile.TemporaryDirectory() as folder:
        tuned = Tuned(base(), Arm("pulled", "full", rate, pull=pull), RANK, 0, SpectralCache(folder))
    optimizer = torch.optim.AdamW(tuned.trained.values(), lr=rate, weight_decay=0.0)
    W = start()[0]
    mean, square = np.zeros_like(W), np.zeros_like(W)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        (0.5 * (tuned.model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        tuned.pull(rate)
        G = gradient(W)
        mean, square = 0.9 * mean + 0.1 * G, 0.999 * square + 0.001 * G**2
        W = W - rate * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        W = W + rate * pull * (start()[0] - W)
    return apart(weight(tuned.model), W)


# -- the change scaled after training


def scaled_lora(method: str, config: Callable[[], Any]) -> float:
    """Outputs at every λ, ours by ``scaled`` and PEFT's by ``rescale_adapter_scale``, of the same trained factors."""
    model, theirs, x = train(ours(method)), config(), data()[0]
    layer, other = model[0], theirs.base_model.model[0]
    held = [getattr(layer, name) for name in ("lora_A", "lora_B")]
    for name, factor in zip(("lora_A", "lora_B"), held, strict=True):
        value = factor if isinstance(factor, Tensor) else factor["default"].weight
        getattr(other, name)["default"].weight.data.copy_(value)
    found = []
    for scale in SCALES:
        with torch.no_grad(), baselines.scaled(model, scale), rescale_adapter_scale(theirs, scale):
            found.append(apart(numpy(model(x)), numpy(theirs(x))))
    return max(found)


def scaled_weights(method: str) -> float:
    """The weights at every λ against ``W + λ (W' − W)`` of the trained weight."""
    model = train(ours(method))
    W, trained = start()[0], weight(model)
    found = []
    for scale in SCALES:
        with baselines.scaled(model, scale, base()):
            found.append(apart(weight(model), W + scale * (trained - W)))
    return max(found)


def checks() -> Iterator[Check]:
    """All checks, in the order of the table."""
    formula, version = "formula in float64", f"PEFT {peft.__version__}"

    def with_peft(name: str, call: str, method: str, config: Callable[[], Any], **settings: Any) -> Check:
        return Check(name, f"{version}, `{call}`", "trained weight", 1e-5, same_training(method, config, **settings))

    def with_paper(name: str, paper: str, difference: Callable[[], float], what: str = "trained weight") -> Check:
        return Check(name, f"arXiv {paper}, {formula}", what, 1e-5, difference)

    def corda_of(which: Any) -> Any:
        return stock(init_lora_weights="corda", corda_config=CordaConfig(corda_method=which))

    yield with_peft("plain LoRA", "LoraConfig", "lora", stock)
    yield with_peft(
        *("rsLoRA, `lora` with `alpha · √rank`", "use_rslora=True", "lora"),
        lambda: stock(use_rslora=True),
        alpha=ALPHA * RANK**0.5,
    )
    yield with_peft(
        "PiSSA, `principal`", 'init_lora_weights="pissa"', "principal", lambda: stock(init_lora_weights="pissa")
    )
    yield with_paper("PiSSA, `principal`", "2404.02948", pissa)
    yield with_paper("MiLoRA, `minor`", "2406.09044", milora)
    yield with_peft("MiCA, `mica`", 'init_lora_weights="mica"', "mica", lambda: stock(init_lora_weights="mica"))
    yield with_paper("MiCA, `mica`", "2604.01694 as PEFT documents it", mica)
    yield with_peft("KaSA, `kasa`", "kasa_config", "kasa", lambda: stock(kasa_config=peft.KasaConfig()))
    yield with_paper("KaSA, `kasa`", "2412.06071 as PEFT documents it", kasa)
    yield with_peft("OSF, `osf`", "OSFConfig", "osf", lambda: in_peft(peft.OSFConfig(target_modules=["0"])))
    yield with_paper("OSF, `osf`", "2504.07097, without its size per layer", osf)
    turn: dict[str, Any] = {"oft_block_size": 4 * RANK, "use_cayley_neumann": False}
    yield with_peft(
        *("OFT, `oft`", "OFTConfig, use_cayley_neumann=False", "oft"),
        lambda: in_peft(peft.OFTConfig(target_modules=["0"], **turn)),
    )
    yield with_paper("OFT, `oft`", "2306.07280", oft)
    yield with_paper("OFT, `oft`", "2306.07280", oft_keeps, "W Wᵀ: angles between neurons, and their lengths")
    for which in ("ipm", "kpm"):
        name = f"CorDA, `corda-{which}`"
        yield with_peft(name, f'preprocess_corda, corda_method="{which}"', f"corda-{which}", partial(corda_of, which))
        yield with_paper(name, "2406.05223", partial(corda, f"corda-{which}"))
    yield with_paper("OPLoRA, `oplora`", "2510.13003", oplora)
    yield with_paper(
        "OPLoRA, `oplora`", "2510.13003", oplora_keeps, "share of the change inside the leading components"
    )
    yield with_paper("LoRA-Null, `lora-null`", "2503.02659, first version", lora_null)
    yield Check("full fine-tuning, `full`", f"gradient descent, {formula}", "trained weight", 1e-5, full)
    yield with_paper("L2 to the start, the studies' `pull`", "1802.01483, decoupled as in 1711.05101", pulled)
    for name, method, config in (
        ("plain LoRA", "lora", stock),
        ("MiCA", "mica", lambda: stock(init_lora_weights="mica")),
    ):
        yield Check(
            f"{name}, scaled by λ",
            f"{version}, `rescale_adapter_scale`",
            f"outputs at λ = {', '.join(f'{scale:g}' for scale in SCALES)}",
            1e-6,
            partial(scaled_lora, method, config),
        )
    for method in ("0.5", "full", *baselines.BASELINES):
        yield Check(
            f"`{method}`, scaled by λ",
            f"arXiv 2109.01903, {formula}",
            f"weights at λ = {', '.join(f'{scale:g}' for scale in SCALES)}",
            1e-5,
            partial(scaled_weights, method),
        )


def main() -> None:
    """Make all rows again."""
    made: list[Row] = []
    for check in checks():
        found = check.difference()
        print(f"{check.baseline:45} {check.source:60} {found:.1e} (at most {check.tolerance:g})")
        values = (check.baseline, check.source, check.compared, f"{found:.1e}", f"{check.tolerance:g}")
        made.append(dict(zip(COLUMNS, values, strict=False)) | facts(torch.device("cpu")))
    PATH.unlink(missing_ok=True)
    append_rows(PATH, made, COLUMNS)


if __name__ == "__main__":
    main()
