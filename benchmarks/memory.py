"""The memory of a training run, before it is used. Takes the flags of train.py, loads no weights and no questions:

    python benchmarks/memory.py --variant II --model Qwen3-8B-Base       # on 1 to 8 GPUs of 80 GB, by kind and phase
    python benchmarks/memory.py --table docs/results/fit.csv             # what is chosen for the paper's models

What is counted, and how settings are chosen: lm/memory.py.
"""

import csv
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import choose_variant
from config import Config, UserError, exit_on_user_error, parse
from lm.memory import Demand, Hardware, Plan, bytes_needed, fit
from lm.model import load_pretrained, meta_model

# Bytes that cards report (nvidia-smi's MiB): RTX 4090, L40S, H100, H200.
CARDS = {"24": 24_564 * 2**20, "48": 46_068 * 2**20, "80": 81_559 * 2**20, "141": 143_771 * 2**20}
GPUS = (1, 2, 4, 8)
HOST = 1e12  # bytes of a machine with GPUs
COLUMNS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COLUMNS += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
SHAPES = {  # published
    "Qwen3-1.7B-Base": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen3-4B-Base": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen3-8B-Base": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Llama-3.2-3B-Instruct": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
}


def shape_of(name: str) -> PreTrainedModel:
    """Build one of the paper's models without weights."""
    shape: dict[str, Any] = dict(zip(COLUMNS, SHAPES[name], strict=True))
    return meta_model(AutoConfig.for_model(shape.pop("model_type"), **shape))


def demand_of(config: Config) -> Demand:
    """Count what the variant asks for, as prepare.py does."""
    variant = choose_variant(config.method)
    sequences = len(variant.policy_views) * config.data.questions_per_step * config.votes
    return Demand(variant.has_teacher + variant.has_frozen_reference, sequences)


def as_text(lm: PreTrainedModel, config: Config) -> str:
    """Lay out the memory on 1 to 8 GPUs of 80 GB, with the settings that are chosen for each."""
    columns: dict[str, dict[str, float]] = {}
    notes = []
    for n in GPUS:
        hardware = Hardware(n, CARDS["80"], HOST)
        try:
            plan = fit(lm, config, demand_of(config), hardware)
            columns[str(n)] = bytes_needed(lm, config, plan, demand_of(config), hardware)
        except UserError as problem:
            notes.append(str(problem))
    lines = [f"{'GiB on each of so many GPUs':<28}" + "".join(f"{n:>9}" for n in columns)]
    for kind in next(iter(columns.values()), {}):
        lines.append(f"{kind:<28}" + "".join(f"{need[kind] / 2**30:>9.1f}" for need in columns.values()))
    return "\n".join(lines + notes)


def cells(variants: tuple[str, ...] = ("I", "II", "III")) -> list[dict[str, str]]:
    """Fit every model, number of GPUs, card and variant; a row each, `-` where nothing fits."""
    rows = []
    for name, variant, card, n in product(SHAPES, variants, CARDS, GPUS):
        config = parse(["--model", name, "--variant", variant])
        lm = shape_of(name)
        hardware = Hardware(n, CARDS[card], HOST)
        row = {"model": name, "variant": variant, "card_gb": card, "gpus": str(n)}
        try:
            plan = fit(lm, config, demand_of(config), hardware)
            row |= {field: str(value) for field, value in plan._asdict().items()}
            row["fullest_gib"] = f"{bytes_needed(lm, config, plan, demand_of(config), hardware)['at most'] / 2**30:.1f}"
        except UserError:
            row |= dict.fromkeys((*Plan._fields, "fullest_gib"), "-")
        rows.append(row)
    return rows


def main() -> None:
    if "--table" in sys.argv:
        file = Path(sys.argv[sys.argv.index("--table") + 1])
        with redirect_stdout(StringIO()):
            rows = cells()
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return
    with exit_on_user_error():
        config = parse()
        lm, _ = load_pretrained(str(config.model.name), torch.float32, weights=False)
        print(as_text(lm, config))


if __name__ == "__main__":
    main()
