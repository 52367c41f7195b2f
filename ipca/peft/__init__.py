"""Windows of singular components in PEFT.

::

    model = peft.get_peft_model(model, PCConfig(r=16, window="middle", target_modules="all-linear"))
    ...
    model.save_pretrained("adapter")  # stock PEFT loads it on the original base
    model = PeftModel.from_pretrained(base, "adapter", config=PCConfig.from_pretrained("adapter"), is_trainable=True)
"""

try:
    import peft
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(f"ipca.peft needs PEFT and transformers ({error}); run: pip install 'ipca-lora[peft]'") from error

if Version(peft.__version__) < Version("0.21") or Version(transformers.__version__) < Version("5.1"):
    raise ImportError(
        f"ipca.peft needs PEFT 0.21 and transformers 5.1 or newer, found PEFT {peft.__version__} and transformers "
        f"{transformers.__version__}; run: pip install -U 'ipca-lora[peft]'"
    )

from ipca.peft.config import PCConfig
from ipca.peft.guards import install_guards
from ipca.peft.model import save_gathered, summary
from ipca.peft.offload import install_offloading
from ipca.peft.preparation import prepare

install_guards()
install_offloading()

__all__ = ["PCConfig", "prepare", "save_gathered", "summary"]
