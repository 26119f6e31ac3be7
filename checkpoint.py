"""Checkpoints from which a run continues as if it had never stopped.

    checkpoints/step-000010/{policy,teacher}/     Hugging Face format, float32
                            trainer.pt            optimizer, step, settings
    checkpoints/latest -> step-000010

Everything random in a run is derived from (seed, step, question), so there is no random state to keep. A checkpoint
is written aside and renamed: it is there whole or not at all.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from packing import PackedLM

HARMLESS = {f"run.{name}" for name in ("out", "resume", "save_every", "tensorboard", "wandb", "profile")}
HARMLESS |= {"sampling.engine_memory"} | {f"data.{name}" for name in ("eval_data", "eval_every", "eval_samples")}


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued, with the reason in one sentence."""


def save_model(model: PackedLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save(
    folder: Path,
    step: int,
    policy: PackedLM,
    teacher: PackedLM | None,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
) -> Path:
    """Write folder/step-N for the state after N optimizer steps, and point folder/latest to it."""
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    save_model(policy, tokenizer, aside / "policy")
    if teacher is not None:
        save_model(teacher, tokenizer, aside / "teacher")
    torch.save({"step": step, "optimizer": optimizer.state_dict(), "config": config}, aside / "trainer.pt")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    link = folder / "latest.incomplete"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "latest")
    return final


def find(resume: str, out: str | None) -> Path:
    """The checkpoint that --resume names; `auto` is the latest of the run in --out."""
    if resume == "auto" and out is None:
        raise CheckpointError("--resume auto: say of which run, with --out runs/NAME")
    path = Path(str(out)) / "checkpoints" / "latest" if resume == "auto" else Path(resume)
    if not (path / "trainer.pt").is_file():
        raise CheckpointError(f"--resume {resume}: {path} holds no checkpoint (no trainer.pt in it)")
    return path.resolve()


def flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"data.source": ..., "sampling.rollouts": ...}"""
    return {f"{group}.{name}": value for group, settings in config.items() for name, value in settings.items()}


def load(
    path: Path,
    policy: PackedLM,
    teacher: PackedLM | None,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
) -> int:
    """Put policy, teacher and optimizer into the state of the checkpoint; returns the number of steps taken."""
    state = torch.load(path / "trainer.pt", weights_only=True)
    before, now = flat(state["config"]), flat(config)
    if differing := sorted(key for key in now if key not in HARMLESS and before.get(key) != now[key]):
        changes = ", ".join(f"{key} (was {before.get(key)}, is {now[key]})" for key in differing)
        raise CheckpointError(f"--resume {path}: made with other settings: {changes}")
    for model, name in ((policy, "policy"), (teacher, "teacher")):
        if model is not None:
            saved = AutoModelForCausalLM.from_pretrained(path / name, dtype=torch.float32)
            model.lm.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
