"""Checkpoints from which a run continues as if it had never stopped, on any number of processes.

    checkpoints/step-000010/{policy,teacher}/     Hugging Face format, float32
                            optimizer/            every process's shards (torch.distributed.checkpoint)
                            trainer.json          step, settings, fingerprint of the questions
                            manifest.json         size and SHA-256 of every other file
    checkpoints/latest -> step-000010

Everything random in a run is derived from (seed, step, question), so there is no random state to keep. A checkpoint
is written aside, synced and renamed: it is there whole or not at all. What the disk does to it later, the manifest
tells before anything is loaded. Processes on several machines need a folder that all of them see.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from config import UserError
from lm import ranks
from lm.scoring import PackedLM
from store.files import changes

HARMLESS = {
    f"run.{name}" for name in ("out", "resume", "save_every", "keep", "keep_every", "tensorboard", "wandb", "profile")
}
HARMLESS |= {f"data.{name}" for name in ("eval_data", "eval_every", "eval_samples")}
HARMLESS |= {f"memory.{name}" for name in ("activation_checkpointing", "offload_optimizer", "offload_teacher")}
# These change rounding, as another number of processes does.
HARMLESS |= {"sampling.engine_memory", "optimisation.tokens_per_micro_batch"}

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no group


@dataclass
class Training:
    """What a checkpoint holds, or is loaded into."""

    policy: PackedLM
    teacher: PackedLM | None
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    settings: dict[str, dict[str, Any]]  # of config.Config
    questions: str  # their fingerprint

    def models(self) -> dict[str, PackedLM]:
        return {"policy": self.policy} | ({"teacher": self.teacher} if self.teacher is not None else {})


# ---------------------------------------------------------------- writing


def save(folder: Path, step: int, training: Training, keep: int = 0, keep_every: int = 0) -> Path:
    """Write folder/step-N for the state after N optimizer steps, point folder/latest to it, remove older ones: all but
    the last `keep` (0: none) and every `keep_every`-th step. All processes must call this.

    Raises:
        UserError: the disk is full, say; the checkpoints before are untouched.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.incomplete"
    try:
        ranks.on_first(partial(begin, aside))
        for name, model in training.models().items():
            save_model(model, training.tokenizer, aside / name)
        state = {"optimizer": get_optimizer_state_dict(training.policy, training.optimizer)}
        save_shards(state, checkpoint_id=aside / "optimizer", no_dist=not ranks.in_group())
        trainer = {"step": step, "settings": training.settings, "questions": training.questions}
        ranks.on_first(partial(finish, aside, final, trainer))
        ranks.on_first(partial(prune, folder, keep, keep_every))
    except (OSError, SafetensorError, CheckpointException) as error:
        reasons = [str(e) for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        raise UserError(
            f"the checkpoint {final} could not be written ({str(reasons[0]).splitlines()[0]}): make room, then go on "
            "with --resume auto; those before it are intact"
        ) from error
    return final


def begin(aside: Path) -> None:
    for left_over in aside.parent.glob("*.incomplete"):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    aside.mkdir(parents=True)


def save_model(model: PackedLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In Hugging Face format; a sharded model is put together tensor by tensor, in the first process's own memory."""
    whole: dict[int, torch.Tensor] = {}  # a tied weight is one parameter under two names
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.lm.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            full = ranks.full(tensor.detach())
            whole[id(tensor)] = full.cpu() if ranks.is_first() else full.new_empty(0)
        weights[name] = whole[id(tensor)]

    def write() -> None:
        model.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    ranks.on_first(write)


def finish(aside: Path, final: Path, trainer: dict[str, Any]) -> None:
    """From here on the checkpoint exists."""
    (aside / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")
    (aside / "manifest.json").write_text(json.dumps(manifest_of(aside), indent=2) + "\n")
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    replaced = final.with_suffix(".replaced.incomplete")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    link = final.parent / "latest.incomplete"
    link.symlink_to(final.name)
    os.replace(link, final.parent / "latest")
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Not in the page cache but on the disk: a machine that loses its power loses no checkpoint."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_of(folder: Path) -> dict[str, list[Any]]:
    """{file: [bytes, SHA-256]} of all files but the manifest."""

    def describe_file(path: Path) -> list[Any]:
        with path.open("rb") as stream:
            return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(describe_file, files), strict=True))


def prune(folder: Path, keep: int, keep_every: int) -> None:
    for old in newest_first(folder)[keep:] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old.rename(old.with_suffix(".incomplete")))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


# ---------------------------------------------------------------- reading


def find_checkpoint(resume: str, out: str | None) -> Path | None:
    """The checkpoint that --resume names; `auto` is the newest intact one of the run in --out, None if that has none
    yet, so that one command both starts a run and continues it."""
    if resume != "auto":
        if fault := fault_of(Path(resume)):
            raise UserError(f"--resume {resume}: {fault}")
        return Path(resume).resolve()
    if out is None:
        raise UserError("--resume auto: say of which run, with --out runs/NAME")
    candidates = newest_first(Path(out) / "checkpoints")
    for path in candidates:
        if not (fault := fault_of(path)):
            return path.resolve()
        print(f"warning: {path} is passed over: {fault}", file=sys.stderr)
    if candidates:
        raise UserError(f"--resume auto: none of {len(candidates)} checkpoints in {out} is intact")
    return None


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written."""
    try:
        written = json.loads((path / "manifest.json").read_text())
        present = manifest_of(path)
    except (OSError, ValueError):
        return "it holds no checkpoint (no readable manifest.json in it)"
    for file, (size, digest) in written.items():
        if file not in present:
            return f"{file} is missing"
        if present[file] != [size, digest]:
            return f"{file} is damaged ({present[file][0]:,} bytes, {size:,} were written)"
    return None


def restore(path: Path, training: Training) -> int:
    """Put policy, teacher and optimizer into the state of the checkpoint; returns the number of steps taken."""
    saved = json.loads((path / "trainer.json").read_text())
    before, now = (
        {f"{group}.{name}": value for group, values in settings.items() for name, value in values.items()}
        for settings in (saved["settings"], training.settings)
    )
    if differing := changes(before, now, HARMLESS):
        raise UserError(f"--resume {path}: made with other settings: {differing}")
    if saved["questions"] != training.questions:
        raise UserError(
            f"--resume {path}: the questions of {training.settings['data']['source']}, or the tokens of their prompts, "
            "have changed since; restore the file, or start a new run from the checkpoint's policy/ with --model"
        )
    for name, model in training.models().items():
        load_model(path / name, model)
    state = {"optimizer": get_optimizer_state_dict(training.policy, training.optimizer)}
    load_shards(state, checkpoint_id=path / "optimizer", no_dist=not ranks.in_group())
    set_optimizer_state_dict(training.policy, training.optimizer, state["optimizer"])
    return int(saved["step"])


def load_model(folder: Path, model: PackedLM) -> None:
    """The first process reads, and gives the others their shards."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if ranks.is_first() else None
    ranks.fill_from_first(ranks.tensors_of(saved) if saved else {}, model.lm)
