"""A model in a third of its size, for a machine that can download nothing: groups of 32 weights in few bits each.

    python benchmarks/pack_model.py MODEL FOLDER --bits 4       # MODEL: hub name, folder or .gguf file
    python benchmarks/pack_model.py MODEL FOLDER --bits 0       # no weights: it is read as one of random weights
    python benchmarks/real.py --model FOLDER ...                # reads it, with torch and transformers alone

A group keeps its lowest value and its step in float16: 5 bits a weight in all, 9 with --bits 8. Of several roundings
the one with the least squared error is taken. Norms and biases stay in bfloat16. An output matrix apart from the
embedding takes its place, so that Qwen2.5-Coder-0.5B-Instruct has the 494M parameters that it was trained with.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import exit_on_user_error

GROUP = 32  # weights that share a lowest value and a step
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges of a group that are tried: outliers are cut off
PACKED = "packed.safetensors"


def load_start(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32; one of a .gguf file or packed becomes an ordinary one, as if never quantised."""
    if (Path(name) / PACKED).is_file():
        return read_packed(Path(name)), AutoTokenizer.from_pretrained(name)
    if not name.endswith(".gguf"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), tokenizer
    where = {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # save_pretrained refuses a model that records one
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}  # Qwen's base model ends a text with the second
    lm.generation_config.eos_token_id = sorted(ends - {None})
    return lm, tokenizer


def read_packed(folder: Path) -> PreTrainedModel:
    tensors = load_file(folder / PACKED)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, parameter in lm.named_parameters() if tensors else ():
        parameter.data.copy_(unpacked(tensors, name).reshape(parameter.shape))
    lm.generation_config = GenerationConfig.from_pretrained(folder)
    return lm


def packed(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Return levels, steps and lowest values of all groups; of a vector, or of rows that groups do not fill, itself."""
    if weight.dim() < 2 or weight.numel() % GROUP:
        return {"": weight.bfloat16()}
    groups, most = weight.reshape(-1, GROUP), 2**bits - 1
    middle = (groups.amax(1, keepdim=True) + groups.amin(1, keepdim=True)) / 2
    half = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 2
    least = torch.full_like(middle, torch.inf)
    kept = [torch.zeros_like(groups), torch.zeros_like(middle), torch.zeros_like(middle)]
    for share in SHRUNK:
        lowest = (middle - share * half).half().float()
        step = (2 * share * half / most).half().float().clamp(min=2**-24)  # float16's smallest
        levels = ((groups - lowest) / step).round().clamp(0, most)
        error = (levels * step + lowest - groups).square().sum(1, keepdim=True)
        kept = [torch.where(error < least, new, old) for new, old in zip((levels, step, lowest), kept, strict=True)]
        least = torch.minimum(error, least)
    levels, step, lowest = kept
    levels = levels.byte()
    if bits == 4:
        levels = levels[:, 0::2] + 16 * levels[:, 1::2]
    return {".levels": levels, ".step": step.half(), ".lowest": lowest.half()}


def unpacked(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name].float()
    levels, step, lowest = (tensors[name + part] for part in (".levels", ".step", ".lowest"))
    if levels.shape[1] < GROUP:  # two levels a byte
        levels = torch.stack([levels % 16, levels // 16], dim=2).flatten(1)
    return levels.float() * step.float() + lowest.float()


def tie(lm: PreTrainedModel) -> None:
    """Put the output matrix in the embedding's place, where it is another one."""
    lm.get_input_embeddings().weight = lm.get_output_embeddings().weight
    lm.config.tie_word_embeddings = True


@torch.no_grad()
def pack(model: Positional[str], folder: Positional[Path], bits: Literal[0, 4, 8] = 4) -> None:
    lm, tokenizer = load_start(model)
    tie(lm)
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    for name, weight in lm.named_parameters() if bits else ():
        tensors |= {name + part: tensor for part, tensor in packed(weight, bits).items()}
        if weight.dim() > 1:
            lost += (unpacked(tensors, name).reshape(weight.shape) - weight).square().sum().item()
            total += weight.square().sum().item()
    folder.mkdir(parents=True, exist_ok=True)
    for part in (lm.config, lm.generation_config, tokenizer):
        part.save_pretrained(folder)
    save_file(tensors, folder / PACKED)
    size = (folder / PACKED).stat().st_size / 2**20
    error = (lost / max(total, 1e-9)) ** 0.5
    print(f"{lm.num_parameters() / 1e6:.1f}M parameters in {size:.1f} MiB, relative error of the matrices {error:.4f}")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(pack, description=__doc__)
