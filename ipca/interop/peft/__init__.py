"""Windows of singular components in PEFT.

>>> from ipca.interop.peft import PCConfig
>>> model = peft.get_peft_model(model, PCConfig(r=16, window="middle", target_modules="all-linear"))
>>> ...
>>> model.save_pretrained("adapter")   # stock PEFT loads it on the original base
>>> model = PeftModel.from_pretrained(base, "adapter", config=PCConfig.from_pretrained("adapter"), is_trainable=True)
"""

import peft
from packaging.version import Version

if Version(peft.__version__) < Version("0.21"):
    raise ImportError(f"ipca.interop.peft needs PEFT 0.21 or newer, found {peft.__version__}; pip install -U peft.")

from ipca.interop.peft.config import PCConfig
from ipca.interop.peft.export import export
from ipca.interop.peft.guards import install_guards
from ipca.interop.peft.prepare import prepare
from ipca.interop.peft.stock import init_
from ipca.interop.peft.summary import summary

install_guards()

__all__ = ["PCConfig", "export", "init_", "prepare", "summary"]
