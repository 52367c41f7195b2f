"""What stock PEFT and transformers make of adapter folders, where ipca cannot be imported.

Usage, in the root of the repository: python -m tests.helpers.stock_process FOLDER. Each folder in FOLDER holds
``case.pt``, a dictionary with the plain ``base``, an input ``x`` and the output ``y`` of the model that was saved to
``adapter``. Prints the differences to ``y`` as JSON.
"""

import copy
import json
import sys
from pathlib import Path

sys.modules["ipca"] = None
sys.modules["torchao"] = None  # old versions of PEFT import what it no longer has
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM, PeftModel  # noqa: E402

torch.set_num_threads(1)


@torch.no_grad()
def difference(model, case):
    y = model.eval()(case["x"])
    y = y if isinstance(y, torch.Tensor) else y.logits
    return ((y - case["y"]).abs().max() / case["y"].abs().max()).item()


def differences(folder):
    case, adapter = torch.load(folder / "case.pt", weights_only=False), str(folder / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(case["base"]), adapter)
    found = {"loaded": difference(loaded, case), "merged": difference(loaded.merge_and_unload(), case)}
    lean = PeftModel.from_pretrained(copy.deepcopy(case["base"]), adapter, low_cpu_mem_usage=True)
    found["low_cpu_mem_usage"] = difference(lean, case)
    if case["transformers"]:
        model = copy.deepcopy(case["base"])
        model.load_adapter(adapter)
        found["transformers"] = difference(model, case)
    if case["auto"]:
        found["auto"] = difference(AutoPeftModelForCausalLM.from_pretrained(adapter), case)
    return found


print(json.dumps({folder.name: differences(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}))
