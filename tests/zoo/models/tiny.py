"""Tiny configurations, random weights and inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

WIDTH, INNER, VOCAB, CLASSES = 32, 48, 99, 6
Inputs = dict[str, Any]
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("hidden_dim", "n_inner"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "embedding_size", "image_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": CLASSES,
    "use_cache": False,
}
RANDOM = ("dropout", "pdrop", "layerdrop", "drop_path_rate", "dropout_rate", "dropout_prob", "drop", "jitter_noise")
"""Ends of the names of settings that draw random numbers in training, which are switched off."""
SCALES = ("layer_scale", "lambda1", "lambda_1", "lambda2", "lambda_2", "gamma_1", "gamma_2", "class_embedding")
"""Parameters whose initial value, zero or nearly so, would hide what comes before them."""


class Architecture(NamedTuple):
    """A model to be tried.

    Attributes:
        class_name: of the model.
        package: the library that has the class.
        make: builds it with random weights.
        inputs: makes the arguments of a forward pass.
    """

    class_name: str
    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def text(B: int = 2, T: int = 9, vocab: int = VOCAB, seed: int = 0) -> Inputs:
    """Token ids and their mask."""
    ids = tokens(B, T, vocab, seed)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens(B: int = 2, T: int = 9, vocab: int = VOCAB, seed: int = 0) -> Inputs:
    """Token ids."""
    return {"input_ids": torch.randint(5, vocab, (B, T), generator=torch.Generator().manual_seed(seed))}


def encoder_decoder() -> Inputs:
    """Token ids for an encoder and for a decoder."""
    return {**text(), "decoder_input_ids": tokens(T=7, seed=1)["input_ids"]}


def image(size: int = 16) -> Inputs:
    """Two pictures."""
    return {"pixel_values": noise(2, 3, size, size)}


def audio(samples: int) -> Inputs:
    """Two sound waves."""
    return {"input_values": noise(2, samples)}


def features(*shape: int, key: str = "input_features") -> Inputs:
    """Random numbers under the name ``key``."""
    return {key: noise(*shape)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(config: str, **settings: Any) -> Any:
    """A small configuration of the class ``config``; a setting that is ``...`` keeps the class's default."""
    cls = getattr(transformers, config)
    parameters = inspect.signature(cls.__init__).parameters
    chosen = {name: value for name, value in SIZES.items() if name in parameters}
    for name, parameter in parameters.items():
        if name.endswith(RANDOM) and type(parameter.default) in (int, float):
            chosen[name] = 0.0
    chosen.update(settings)
    made = cls(**{name: value for name, value in chosen.items() if value is not ...})
    with suppress(Exception):  # some composite configurations have no labels
        made.num_labels = CLASSES
    return made


def model(
    class_name: str, config: str | Callable[[], Any], inputs: Callable[[], Inputs] = text, **settings: Any
) -> Architecture:
    """A class of transformers with the configuration ``config``: a class name with ``settings``, or a function."""

    def make() -> nn.Module:
        made = tiny(config, **settings) if isinstance(config, str) else config()
        return getattr(transformers, class_name)(made)

    return Architecture(class_name, "transformers", make, inputs)


def diffuser(class_name: str, inputs: Callable[[], Inputs], **settings: Any) -> Architecture:
    """A class of diffusers with ``settings``."""

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, class_name)(**settings)

    return Architecture(class_name, "diffusers", make, inputs)


def build(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """The model, in evaluation mode and the same in every call, and inputs."""
    torch.manual_seed(0)
    model = architecture.make()
    randomize(model)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval(), architecture.inputs()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every weight the scale of a trained one: what transformers draws is so small that errors would not show."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or not weight.requires_grad:
            continue  # tables of positions are computed again when a model is loaded
        inputs = len(weight) if type(module).__name__ == "Conv1D" else weight[0].numel()
        scale = 1 / math.sqrt(4 if isinstance(module, nn.Embedding) else inputs)
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            weight[module.padding_idx] = 0  # as trained, and as some models set it when they are loaded
        if isinstance(bias, nn.Parameter) and bias.ndim == 1:
            bias.copy_(0.05 * torch.randn(bias.shape, generator=generator))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
        if any(part in name for part in SCALES):
            parameter.fill_(0.7)
