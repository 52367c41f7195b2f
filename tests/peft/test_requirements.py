"""What ipca.peft tells where PEFT or transformers is missing or too old."""

import importlib
import subprocess
import sys

import peft
import pytest
import transformers


@pytest.mark.parametrize("hidden", ["peft", "transformers"])
def test_a_missing_library_names_the_extra(hidden):
    code = f"import sys; sys.modules[{hidden!r}] = None; import ipca.peft"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ipca.peft needs PEFT and transformers (")
    assert last.endswith("run: pip install 'ipca-lora[peft]'")
    assert hidden in last


@pytest.mark.parametrize(("library", "version"), [(peft, "0.20.1"), (transformers, "5.0.2")], ids=["peft", "hf"])
def test_an_older_library_names_the_extra(library, version, monkeypatch):
    monkeypatch.setattr(library, "__version__", version)
    monkeypatch.delitem(sys.modules, "ipca.peft", raising=False)
    words = r"needs PEFT 0\.21 and transformers 5\.1 or newer, found PEFT .*; run: pip install -U 'ipca-lora\[peft\]'$"
    with pytest.raises(ImportError, match=words) as raised:
        importlib.import_module("ipca.peft")
    assert version in str(raised.value)
