"""A pretended CUDA device: the code that Inductor writes for one, without one.

For a process of its own: functions of torch and Triton are replaced for good, and Triton must not interpret.
"""

from types import SimpleNamespace

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor

from bench.kernel_cases import LIMITS
from bench.offline import Driver, cuda_answers

MODE = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
MULTIPROCESSORS = 132


def pretend(arch=90):
    """Let torch and Triton find one device of compute capability ``arch / 10``."""
    major, minor = divmod(arch, 10)
    facts = SimpleNamespace(
        name="pretended", gcnArchName="", major=major, minor=minor, multi_processor_count=MULTIPROCESSORS
    )
    rng = {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None}
    for name, answer in (cuda_answers(facts) | rng).items():
        setattr(torch.cuda, name, answer)
    fake_tensor.init_gpu_context = lambda device: None
    rest = [None] * (len(DeviceProperties._fields) - 4)
    DeviceProperties.create = classmethod(lambda cls, device: cls("cuda", 0, MULTIPROCESSORS, arch, *rest))
    driver = Driver(arch)
    driver.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": LIMITS[arch].shared})
    driver.get_active_torch_device = lambda: torch.device("cuda", 0)
    triton.runtime.driver.set_active(driver)


def fake(*shape, dtype=torch.bfloat16):
    """A CUDA tensor without values."""
    with MODE:
        return torch.empty(*shape, dtype=dtype, device="cuda")


def inductor_code(function, *tensors):
    """What Inductor writes for ``function`` of fake tensors, without gradients."""
    codes = []

    def lower(graph, inputs):
        with V.set_fake_mode(torch._guards.detect_fake_mode(inputs)):
            post_grad_passes(graph, is_inference=True)
            lowered = GraphLowering(graph, example_inputs=inputs, is_inference=True)
            with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
                lowered.run(*inputs)
                codes.append(lowered.codegen()[0].value)
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        return lambda *given: [node.meta["val"] for node in outputs]

    with MODE, torch.no_grad():
        aot_function(function, fw_compiler=lower, decompositions=select_decomp_table())(*tensors)
    (code,) = codes
    return code
