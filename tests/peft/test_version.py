import importlib
import sys

import peft
import pytest


def test_an_older_peft_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    monkeypatch.delitem(sys.modules, "ipca.peft", raising=False)
    with pytest.raises(ImportError, match=r"needs PEFT 0\.21 or newer, found 0\.20\.1; pip install -U peft"):
        importlib.import_module("ipca.peft")
