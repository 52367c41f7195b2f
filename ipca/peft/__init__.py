"""Windows of singular components in PEFT.

>>> from ipca.peft import PCConfig
>>> model = peft.get_peft_model(model, PCConfig(r=16, window="middle", target_modules="all-linear"))
>>> ...
>>> model.save_pretrained("adapter")   # stock PEFT loads it on the original base
>>> model = PeftModel.from_pretrained(base, "adapter", config=PCConfig.from_pretrained("adapter"), is_trainable=True)
"""

import peft
from packaging.version import Version

if Version(peft.__version__) < Version("0.21"):
    raise ImportError(f"ipca.peft needs PEFT 0.21 or newer, found {peft.__version__}; pip install -U peft.")

from ipca.peft.config import PCConfig
from ipca.peft.gather import export
from ipca.peft.guards import install_guards
from ipca.peft.init_in_place import init_
from ipca.peft.preparation import prepare
from ipca.peft.summary import summary

install_guards()

__all__ = ["PCConfig", "export", "init_", "prepare", "summary"]
