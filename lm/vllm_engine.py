"""Sample with vLLM inside the trainer's process, with the members of `lm/decoding.py: TransformersSampler`.

An engine starts without weights and is only ever sampled inside `loaded`, after a complete load, so its weights can be
neither stale nor half-loaded. The first load is checked against the model's own log-probs. Under torchrun every process
has an engine of its own. The calls below are the same in vLLM 0.24 to 0.33.
"""

import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from config import UserError
from lm import distributed
from lm.decoding import Capacity, Sample
from lm.memory import cached_bytes_of_a_token
from lm.model import meta_model, own_logp
from lm.record import Rollout

# Tokens of a block of vLLM's KV cache on a CPU. Rollouts of a question share its prompt's full blocks, which are read
# once; these are the smallest ones, of vLLM's own 128 a short prompt fills none.
CPU_BLOCK = 32
CHECKED_PROMPT = 160  # tokens of the check after the first load
CHECKED_RESPONSE = 32
# Mean difference in nats that fails it. In bfloat16 rounding alone makes 0.01 to 0.14; a weight left out makes nats.
CHECK_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.3}


class VLLMSampler:
    """A vLLM engine; several can live in a process, but closing one closes torch.distributed for all."""

    def __init__(
        self, lm: PreTrainedModel, eos_ids: Sequence[int], compute_dtype: torch.dtype, capacity: Capacity
    ) -> None:
        self.eos_ids = list(eos_ids)
        self.dtype = compute_dtype
        self.capacity = capacity
        self.on_gpu = torch.cuda.is_available()  # not where the weights are: they may be off-loaded
        self.sync_seconds: float | None = None
        self._held = False
        self._checked = False
        self._needed = set(meta_model(lm.config).state_dict())
        settings: dict[str, Any] = {"dtype": str(compute_dtype).removeprefix("torch.")}
        settings["max_model_len"] = capacity.sequence_tokens
        if self.on_gpu:
            settings |= {"enable_sleep_mode": True, "gpu_memory_utilization": capacity.engine_memory}
            if capacity.engine_cache_gb:  # then the share only says how much must be free at the start
                settings |= {
                    "kv_cache_memory_bytes": int(capacity.engine_cache_gb * 1e9),
                    "gpu_memory_utilization": 0.01,
                    "max_model_len": self.round_length(lm),
                }
            # by itself vLLM keeps graphs and room for 1,024 at once
            settings["max_num_seqs"] = min(1024, math.ceil(capacity.sequences / distributed.world_size()))
        else:
            settings |= cpu_limits(lm, compute_dtype, capacity)
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        with preserve_host_state(self.on_gpu):
            self.llm = start_engine(lm, settings)
            # PyTorch goes on counting what an engine that sleeps has given back.
            self.sleeping_bytes = torch.cuda.memory_allocated() - before if self.on_gpu else 0
            self._sleep()

    def round_length(self, lm: PreTrainedModel) -> int:
        """Return the longest sequence, rounded up: vLLM compiles anew for every other length."""
        known = getattr(lm.config.get_text_config(), "max_position_embeddings", self.capacity.sequence_tokens)
        return int(min(256 * math.ceil(self.capacity.sequence_tokens / 256), known))

    @contextmanager
    def loaded(self, lm: PreTrainedModel) -> Iterator[Sample]:
        if self._held:
            raise UserError("the sampler is in use: leave its `with` block first")
        begin = time.perf_counter()
        with preserve_host_state(self.on_gpu):
            self._wake("weights")
            self._load(lm)
            self._wake("kv_cache")
            if not self.llm.reset_prefix_cache():
                raise UserError("vLLM did not reset its prefix cache: prefixes of older weights would be reused")
        self.sync_seconds = time.perf_counter() - begin
        self._held = True
        try:
            if not self._checked:
                self._check(lm)
            yield self._sample
        finally:
            self._held = False
            with preserve_host_state(self.on_gpu):
                self._sleep()

    def close(self) -> None:
        """End the engine, and torch.distributed with it, before the interpreter's exit: by then its groups are gone."""
        self.llm.llm_engine.engine_core.shutdown()

    def _wake(self, tag: str) -> None:
        if not self.on_gpu:
            return
        torch.cuda.empty_cache()  # what the trainer has cached but does not use
        try:
            self.llm.wake_up(tags=[tag])
        except RuntimeError as error:  # also torch.OutOfMemoryError
            if "out of memory" not in str(error).lower():
                raise
            free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
            raise UserError(
                f"vLLM's {tag} do not fit beside the trainer ({free:.1f} of {total:.1f} GB are free): "
                f"--engine-memory under {self.capacity.engine_memory}, or the flags that docs/PERFORMANCE.md names"
            ) from error

    def _sleep(self) -> None:
        if self.on_gpu:
            self.llm.sleep(level=2)  # drops the weights too: the next `loaded` loads them anyway

    def _load(self, lm: PreTrainedModel) -> None:
        """Load all of the model's tensors under their Hugging Face names, a tied one under each of its names.

        vLLM fuses and shards them itself, but fills a fused block from a part of it without complaint.
        """
        if missing := sorted(self._needed - lm.state_dict().keys()):
            raise UserError(f"weight {missing[0]}: the model's is missing")
        checked = self._checked
        self._checked = False  # what follows a failed load is checked again
        name = ""

        def stream() -> Iterator[tuple[str, Tensor]]:
            nonlocal name
            for name, tensor in lm.state_dict().items():
                tensor = tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor
                yield name, distributed.full_tensor(tensor)  # one at a time: whole, the model would not fit

        tensors = stream()
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        except Exception as error:
            raise UserError(f"vLLM did not take the weight {name}: {error}") from error
        if left := next(tensors, None):
            raise UserError(f"vLLM stopped loading before the weight {left[0]}")
        self._checked = checked

    def _sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], n: int, **how: Any) -> list[Rollout]:
        if not self._held:
            raise UserError("sampling outside of `loaded`: the engine's weights belong to no model")
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": prompt} for prompt, _ in product(prompts, range(n))]
        parameters = [
            SamplingParams(
                **how,  # temperature, max_tokens, top_p
                seed=seed + g,  # any integer of 64 bits except -1, which vLLM reads as none
                stop_token_ids=self.eos_ids,
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,
                detokenize=False,
            )
            for seed, g in product(seeds, range(n))
        ]
        with preserve_host_state(self.on_gpu):
            outputs = self.llm.generate(asked, parameters, use_tqdm=partial(tqdm, leave=False, delay=5))
        rollouts = []
        for request, output in zip(asked, outputs, strict=True):
            (response,) = output.outputs
            logp = list(response.logprobs.logprobs)
            finished = response.finish_reason == "stop"
            rollouts.append(Rollout(request["prompt_token_ids"], list(response.token_ids), logp, finished))
        return rollouts

    def _check(self, lm: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(0)
        length = max(1, min(CHECKED_PROMPT, self.capacity.sequence_tokens - CHECKED_RESPONSE))
        prompt = torch.randint(lm.config.vocab_size, (length,), generator=generator).tolist()
        tokens = min(CHECKED_RESPONSE, self.capacity.sequence_tokens - length)
        (rollout,) = self._sample([prompt], [0], n=1, temperature=1.0, max_tokens=tokens)
        gap = (own_logp(lm, rollout, self.dtype) - torch.tensor(rollout.logp)).abs().mean().item()
        if not gap < CHECK_BOUND[self.dtype]:
            raise UserError(
                f"after loading its weights into vLLM, log-probs of the family '{lm.config.model_type}' are {gap:.2g} "
                f"nats off the model's own (bound {CHECK_BOUND[self.dtype]}): take --sampler hf, or another vLLM"
            )
        self._checked = True


def start_engine(lm: PreTrainedModel, settings: dict[str, Any]) -> Any:
    """Start a vLLM engine in this process for models like `lm`, still without weights."""
    from vllm import LLM

    config = deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    under_torchrun = torch.distributed.is_initialized() and "RANK" in os.environ
    # vLLM finds what it has compiled by the model's path, so that the same config must have the same.
    text = config.to_json_string()
    folder = Path(tempfile.gettempdir(), f"co-rewarding-{os.getuid()}-{sha256(text.encode()).hexdigest()[:16]}")
    folder.mkdir(mode=0o700, exist_ok=True)
    aside = folder / f"{os.getpid()}.json"
    aside.write_text(text)
    os.replace(aside, folder / "config.json")
    try:
        return LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # no top_k or repetition penalty from the model's own
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled, at its temperature
            disable_log_stats=True,
            distributed_executor_backend="external_launcher" if under_torchrun else None,
            **settings,
        )
    except ValueError as error:  # settings that vLLM refuses
        raise UserError(f"vLLM does not start: {error}") from error


def cpu_limits(lm: PreTrainedModel, dtype: torch.dtype, capacity: Capacity) -> dict[str, Any]:
    """Size the key-value cache for a CPU, where no engine sleeps: as large as the sequences need, at most its share."""
    sequences = min(capacity.sequences, 256)  # sampled at once
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    blocks = sequences * math.ceil(capacity.sequence_tokens / CPU_BLOCK) + 1  # vLLM keeps one for itself
    needed = blocks * CPU_BLOCK * cached_bytes_of_a_token(lm, dtype.itemsize)
    return {
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": min(needed, int(capacity.engine_memory * memory)),
        "max_num_seqs": sequences,
        "enforce_eager": True,
        # A prompt that is read in two parts makes vLLM rewind its request's random numbers, which a CPU cannot.
        "enable_chunked_prefill": False,
    }


@contextmanager
def preserve_host_state(on_gpu: bool) -> Iterator[None]:
    """Restore the environment and PyTorch's threads, which vLLM changes.

    Random numbers need no care: the trainer draws none from the global generators. On a CPU vLLM would compile for a
    minute and gain nothing.
    """
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    set_num_threads = torch.set_num_threads
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    eager = nullcontext() if on_gpu else torch.compiler.set_stance("force_eager")
    try:
        with eager, warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
