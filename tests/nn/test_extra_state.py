import copy

import pytest
import torch

from ipca.nn import LinearPC


def test_damaged_record_is_reported():
    layer = LinearPC(8, 8, 2)
    state = {k: v.clone() for k, v in LinearPC(8, 8, 2).state_dict().items()}
    before = copy.deepcopy(layer.state_dict())
    for text in (b"{}", b"[]", b"not json", b"\xff"):
        state["_extra_state"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="the layer's record"):
            layer.load_state_dict(state)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
