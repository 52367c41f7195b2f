"""Tiny random architectures: each is built from its configuration in milliseconds, with inputs that fit."""

from tests.zoo.models.audio import AUDIO
from tests.zoo.models.decoders import DECODERS
from tests.zoo.models.diffusion import DIFFUSION
from tests.zoo.models.encoder_decoders import ENCODER_DECODERS
from tests.zoo.models.encoders import ENCODERS
from tests.zoo.models.mixtures import MIXTURES
from tests.zoo.models.multimodal import MULTIMODAL
from tests.zoo.models.recurrent import RECURRENT
from tests.zoo.models.series import SERIES
from tests.zoo.models.vision import VISION

KINDS = {
    "Language models": DECODERS,
    "Mixtures of experts": MIXTURES,
    "Recurrent and hybrid language models": RECURRENT,
    "Text encoders": ENCODERS,
    "Encoder-decoder models": ENCODER_DECODERS,
    "Vision": VISION,
    "Audio": AUDIO,
    "Vision and language": MULTIMODAL,
    "Time series": SERIES,
    "Diffusion": DIFFUSION,
}
ARCHITECTURES = {name: architecture for kind in KINDS.values() for name, architecture in kind.items()}
