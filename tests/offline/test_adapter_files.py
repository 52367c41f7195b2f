"""Safetensors files written tensor by tensor have the bytes that the safetensors library writes."""

import hashlib

import torch
from safetensors.torch import save_file

from ipca.io.checkpoint import read_header
from ipca.offline.adapter_files import in_file_order, write_tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AWKWARD = ("b", "a", "layer.10", "layer.2", "B", 'quoted "x"', "é", "\uffee", "\U0001f600")


def test_a_streamed_file_is_byte_for_byte_the_librarys(tmp_path):
    held = {name: torch.randn(3, i).to(FLOATS[i % 4]) for i, name in enumerate(AWKWARD)}
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in held.items()}
    asked = []

    def tensor_of(name):
        asked.append(name)
        return held[name].mT.contiguous().mT  # another memory layout

    digest = write_tensors(tmp_path / "mine", layout, tensor_of, metadata={"format": "pt"})
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert asked == in_file_order(layout) == list(read_header(tmp_path / "theirs"))
    assert digest == hashlib.sha256((tmp_path / "theirs").read_bytes()).hexdigest()
