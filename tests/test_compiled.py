"""What --compile makes of a step, as far as a CPU can show it: FSDP over a group of one, bfloat16, flash attention of
variable length with a kernel for the CPU, compiled. Each test is named after what would go wrong."""

import importlib.util
import subprocess
import sys

import flash_on_cpu
import pytest
import torch
from runs import ROOT
from test_gpu_path import in_a_group_of_one
from tiny import CPU, tiny_lm, tiny_rollouts

from config import UserError, parse
from lm import memory
from lm.memory import Demand, Hardware
from lm.model import compile_models, plain_attention
from lm.packing import pack
from lm.scoring import PackedLM

NEEDS_KERNEL = pytest.mark.skipif(
    not flash_on_cpu.available, reason="PyTorch has other private names for flash attention of variable length"
)

STEPS = """
import json, random, sys
import flash_on_cpu
import torch
from tiny import tiny_lm, tiny_rollouts
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from config import Config
from grpo import optimizer_step
from lm import distributed
from lm.model import checkpoint_activations, compile_models, frozen_copy, shard
from lm.packing import pack
from lm.scoring import PackedLM, score

family, recompute = sys.argv[1:]
distributed.start()
flash_on_cpu.install()
shape = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=128, head_dim=16)


def steps_of(dtype, compiled):
    policy = PackedLM(tiny_lm(family, tied=True, **shape), dtype)
    shard(policy, init_device_mesh("cpu", (1,)))
    reference = frozen_copy(policy)
    if compiled:
        compile_models([policy, reference], recompute == "light")
    if recompute == "on":
        checkpoint_activations(policy)
    optimizer, seen = torch.optim.SGD(policy.parameters(), lr=0.0), []

    def note(*_):
        seen.append(torch.cat([distributed.full_tensor(p.grad).flatten() for p in policy.parameters()]))

    optimizer.register_step_pre_hook(note)
    for seed, count in enumerate((6, 1, 9, 17, 2)):
        rollouts = tiny_rollouts(count, seed=seed, longest=20)
        for i, rollout in enumerate(rollouts):
            rollout.advantage, rollout.denominator = (-1.0) ** i, 10.0
        batch = pack(rollouts, range(count), torch.device("cpu"))
        (stats,) = score(reference, [batch], 1.0)
        batch.reference_logp = stats.logp + 0.1  # so that the KL term has a gradient
        optimizer_step(policy, optimizer, [batch], 0.0, 0.1, Config())
        seen[-1] = (stats.logp, seen[-1])
    return seen


def gaps(ours, exact):
    # mean over the steps of the relative distance of log-probs and of gradients
    pairs = [[((a - b).norm() / b.norm()).item() for a, b in zip(*step)] for step in zip(ours, exact)]
    return [sum(pair[kind] for pair in pairs) / len(pairs) for kind in range(2)]


exact, eager = steps_of(torch.float32, False), steps_of(torch.bfloat16, False)
counters.clear()
compiled = steps_of(torch.bfloat16, True)
print(json.dumps({
    "eager": gaps(eager, exact), "compiled": gaps(compiled, exact), "breaks": dict(counters["graph_break"]),
    "graphs": counters["stats"]["unique_graphs"],
}))
"""


@pytest.mark.slow
@NEEDS_KERNEL
@pytest.mark.parametrize(
    "family, recompute", [("qwen3", "off"), ("qwen3", "on"), ("llama", "light"), ("phi3", "light")]
)
def test_a_compiled_step_rounds_more_than_an_eager_one_or_is_compiled_again_and_again(
    family: str, recompute: str
) -> None:
    """Of lengths and numbers of rows that differ from step to step, one row included: a graph for the layers of the
    policy, one for those of the reference, and the head's two."""
    seen = in_a_group_of_one(STEPS, family, recompute)
    for compiled, eager in zip(seen["compiled"], seen["eager"], strict=True):
        assert 0 < compiled < eager
    assert seen["breaks"] == {}
    assert seen["graphs"] <= 2 + 2


KEPT = """
import functools, json, sys
import flash_on_cpu
import torch
from tiny import tiny_lm
from torch.distributed.device_mesh import init_device_mesh

from lm import distributed, memory
from lm.model import compile_models, shard
from lm.packing import pack
from lm.record import Rollout
from lm.scoring import PackedLM

family, how = sys.argv[1:]
distributed.start()
flash_on_cpu.install()
# what is kept is decided before code is generated: this back end decides as the default one does, and generates none
torch.compile = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
PRODUCTS = ("aten::mm", "aten::addmm")


def measure(layers):
    # products of a backward pass, and bytes that autograd keeps of a token, weights aside
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=64)
    lm = tiny_lm(family, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, **heads)
    policy = PackedLM(lm, torch.bfloat16)
    shard(policy, init_device_mesh("cpu", (1,)))
    if how != "eager":
        compile_models([policy], how == "light")
    kept = []
    for rows in (4, 8, 4):
        rollouts, seen = [Rollout(list(range(32)), list(range(96)), [0.0] * 96, True)] * rows, {}

        def note(tensor):
            seen[tensor.untyped_storage()._cdata] = tensor
            return tensor

        batch = pack(rollouts, range(rows), torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logp = policy(batch, 1.0).logp
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
        with torch.profiler.profile() as profiler:
            logp.sum().backward()
    products = sum(event.count for event in profiler.key_averages() if event.key in PRODUCTS)
    return products, (kept[1] - kept[0]) / (4 * 128)


(products, bytes_kept), (more_products, more_bytes) = measure(2), measure(3)
planned = memory.kept_of_a_token(tiny_lm(family, hidden_size=256, intermediate_size=768, num_attention_heads=4,
                                         num_key_value_heads=1, head_dim=64), 2, how != "eager", how == "light")
print(json.dumps({"products": more_products - products, "kept": more_bytes - bytes_kept, "planned": planned}))
"""


@pytest.mark.slow
@NEEDS_KERNEL
@pytest.mark.parametrize("how", ["off", "light"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_light_recomputation_multiplies_again_or_keeps_other_activations_than_planned(family: str, how: str) -> None:
    """A layer has 7 products forward and 14 backward; a 15th would be one that is computed again. The share of
    activations that are kept is a private setting of PyTorch: should it go, `light` keeps as much as `off`."""
    seen = in_a_group_of_one(KEPT, family, how)
    assert seen["products"] == 14
    assert seen["kept"] == pytest.approx(seen["planned"], rel=0.2)


@NEEDS_KERNEL
def test_the_kernel_of_these_tests_is_not_attention() -> None:
    """Against the padded attention of a CPU, forward and backward, with shared key heads and a window."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    shapes = (13, 4, 8), (13, 2, 8), (13, 2, 8)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    grad = torch.randn(13, 4, 8, generator=generator)
    for window in ([-1, 0], [2, 0]):
        out, lse, state = flash_on_cpu.forward(q, k, v, bounds, bounds, 7, 7, False, None, window)
        ours = flash_on_cpu.backward(grad, q, k, v, out, lse, bounds, bounds, 7, 7, False, state, None, window)
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        outputs = []
        for a, b in ((0, 5), (5, 6), (6, 13)):
            query, key, value = (tensor[a:b].transpose(0, 1) for tensor in inputs)
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (distance >= 0) & (distance <= (window[0] if window[0] >= 0 else 99))
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
            outputs.append(output.transpose(0, 1))
        expected = torch.cat(outputs)
        assert torch.allclose(out, expected, atol=1e-5)
        for one, other in zip(ours, torch.autograd.grad(expected, inputs, grad), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_sampling_from_a_compiled_model_compiles_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compile_function = torch.compile

    def counting(graph: torch.fx.GraphModule, _: object) -> object:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_function(function, backend=counting))
    policy = PackedLM(tiny_lm())
    compile_models([policy])
    with plain_attention(policy.lm), torch.no_grad():
        policy.lm(torch.arange(5)[None], use_cache=False)
    assert not calls
    with torch.no_grad():
        policy(pack(tiny_rollouts(3), range(3), CPU), 1.0)
    assert calls
    torch._dynamo.reset()


def test_light_without_compiled_layers_keeps_everything_in_silence() -> None:
    config = parse(["--activation-checkpointing", "light"])
    with pytest.raises(UserError, match="add --compile on"):
        memory.fit(tiny_lm(), config, Demand(1, 8), Hardware(0, 0.0, 1e12))
    on_gpus = memory.fit(tiny_lm(), config, Demand(1, 8), Hardware(1, 80e9, 1e12))
    assert on_gpus.compiled and on_gpus.activation_checkpointing == "light"
    off = parse(["--compile", "off"])
    assert not memory.fit(tiny_lm(), off, Demand(1, 8), Hardware(1, 80e9, 1e12)).compiled


@pytest.mark.slow
def test_the_command_with_compile_on_a_cpu_fails_or_does_not_say_what_it_took(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "train.py", "--steps", "2", "--eval-every", "0", "--questions-per-step", "4"]
    command += ["--rollouts", "4", "--eval-data", "None", "--out", str(tmp_path / "run"), "--compile", "on"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "compiling" in said and "--compile off" in said
    first, second = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "seconds_compile" in first and "tokens_per_second/train" in second


GENERATED = """
import json
import flash_on_cpu
import torch
import torch._inductor.async_compile as async_compile
import torch._inductor.config as inductor
import triton
from tiny import tiny_lm, tiny_rollouts
from torch.distributed.device_mesh import init_device_mesh
from triton.backends.compiler import GPUTarget

from lm import distributed
from lm.model import compile_models, shard
from lm.packing import pack
from lm.scoring import PASSES, PackedLM


class NoGPU:
    def __getattr__(self, name):
        return lambda *_, **__: 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Kernel:
    # generated for a GPU and only ever counted
    def __init__(self, source):
        self.source = source

    def run(self, *arguments, **_):
        ran.append(max((x.numel() for x in arguments if isinstance(x, torch.Tensor)), default=0))


ran = []
inductor.cpu_backend, inductor.compile_threads, inductor.fx_graph_cache = "triton", 1, False
torch._functorch.config.enable_autograd_cache = False
triton.runtime.driver.set_active(NoGPU())
async_compile.AsyncCompile.triton = lambda self, name, source, *_, **__: Kernel(source)
distributed.start()
flash_on_cpu.install()


def kernels(layers):
    torch._dynamo.reset()
    shape = dict(hidden_size=256, intermediate_size=768, num_attention_heads=2, num_key_value_heads=1, head_dim=128)
    policy = PackedLM(tiny_lm("qwen3", tied=True, num_hidden_layers=layers, **shape), torch.bfloat16)
    shard(policy, init_device_mesh("cpu", (1,)))
    compile_models([policy])
    batch = pack(tiny_rollouts(40), range(40), torch.device("cpu"))
    ran.clear()
    logp = policy(batch, 1.0).logp
    forward = len(ran)
    logp.sum().backward()
    return forward, len(ran) - forward


fewer, more = kernels(2), kernels(3)
logits, rows = torch.zeros(50, 40_000, dtype=torch.bfloat16), torch.zeros(50)
touching = []
for function, inputs in zip(PASSES, [(rows[:, None].long(), 1.0), (rows, rows, rows, 1.0)]):
    ran.clear()
    torch.compile(function, dynamic=True)(logits, *inputs)
    touching.append(sum(entries == logits.numel() for entries in ran))
print(json.dumps({"layer": [b - a for a, b in zip(fewer, more)], "touching logits": touching}))
"""


@pytest.mark.slow
@NEEDS_KERNEL
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton, which comes with vLLM, writes the code")
def test_the_code_for_a_gpu_has_more_kernels_than_were_planned_with() -> None:
    """Of a layer 46 element-wise kernels forward and 93 backward become 11 and 9; each of the head's passes is one that
    touches logits. The code is generated without a GPU, by private names of PyTorch 2.13."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip("how code for a GPU is generated without one is known of PyTorch 2.13")
    seen = in_a_group_of_one(GENERATED)
    forward, backward = seen["layer"]
    assert 0 < forward <= 12 and 0 < backward <= 10
    assert seen["touching logits"] == [1, 1]
