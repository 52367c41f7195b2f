"""The vision study on a random transformer of two layers with random images: whole runs in seconds."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from studies.frontier.design import Wave
from studies.frontier.training import Study
from studies.vision.measure import Images
from studies.vision.model import SaliencyDecoder, SaliencyViT, pooled, tokens_of
from studies.vision.probe import Probe
from studies.vision.protocol import PLAN

SIDE, CLASSES = 28, 3
TWO = ("middle", "lora")
RATES = {"middle": 1e-3, "lora": 3e-3}


def design():
    waves = (Wave(8, TWO, (0,), True), Wave(8, TWO, (0,), False))
    arms = {name: replace(arm, rate=RATES.get(name, arm.rate)) for name, arm in PLAN.arms.items()}
    return replace(PLAN, waves=waves, arms=arms, targets={("kinds", 8): (0.675, 0.67, 0.665)}, rank=4, batch=8)


@cache
def model():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        initializer_range=0.2,
        layerscale_value=1.0,
        use_mask_token=False,
    )
    found = SaliencyViT(Dinov2Model(config), SaliencyDecoder(32, (16, 8, 4))).eval()
    for layer in found.decoder:
        if hasattr(layer, "kernel_size"):
            layer.weight.data *= 6  # a random decoder's map is all but constant
    return found


@cache
def images():
    """Classes differ by a pattern under noise."""
    draw = torch.Generator().manual_seed(1)
    patterns = torch.randint(0, 256, (CLASSES, 3, SIDE, SIDE), generator=draw)

    def some(count, share=0.0):
        labels = torch.arange(count) % CLASSES
        noise = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=draw)
        return (share * patterns[labels] + (1 - share) * noise).to(torch.uint8), labels

    (train, labels), (new, new_labels) = some(48, 0.3), some(24, 0.3)
    kept = {name: some(count)[0] for name, count in (("photos", 8), ("emoji", 18), ("textiles", 6))}
    with torch.no_grad():
        probe = Probe.fit(pooled(tokens_of(model(), train[:12])), labels[:12])
    return Images(train, labels, new, new_labels, kept, torch.arange(18) % CLASSES, 12, probe)


def study(work):
    found = {"protocol": "p", "model": "m"}
    return Study(design(), model(), {"kinds": images()}, Path(work), found, progress=False)
