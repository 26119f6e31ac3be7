"""Checkpoints from which a run continues as if it had never stopped, on any number of processes.

    checkpoints/step-000010/{policy,teacher}/     Hugging Face format, float32
                            optimizer/            AdamW's two moments under the names of their weights, safetensors
                            trainer.json          step, settings, fingerprint of the questions
                            manifest.json         size and SHA-256 of every other file
    checkpoints/latest -> step-000010

Everything random in a run is derived from (seed, step, question), so there is no random state to keep. A checkpoint
is written aside, synced and renamed: it is there whole or not at all. What the disk does to it later, the manifest
tells before anything is loaded, and nothing in it is code: a stranger's checkpoint can be wrong, but it cannot act.
Processes on several machines need a folder that all of them see.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import UserError, by_flag, load_config
from lm import distributed
from lm.model import read_weights
from lm.scoring import PackedLM
from store.jsonl import changes, fingerprint

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them

# Flags that may differ from those of the checkpoint. The last row changes rounding, as other processes do.
HARMLESS = {"--out", "--resume", "--config", "--save", "--save-every", "--keep", "--keep-every", "--tensorboard"}
HARMLESS |= {"--eval-data", "--eval-every", "--eval-samples", "--eval-question-column", "--eval-answer-column"}
HARMLESS |= {"--preflight", "--data-dir", "--activation-checkpointing", "--offload-optimizer", "--offload-teacher"}
HARMLESS |= {"--stop-on-collapse", "--engine-memory", "--engine-cache-gb", "--wandb"}
HARMLESS |= {"--tokens-per-micro-batch", "--fit", "--compile"}


@dataclass
class Training:
    policy: PackedLM
    teacher: PackedLM | None
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    settings: dict[str, dict[str, Any]]  # of config.Config
    questions: str  # their fingerprint

    def models(self) -> dict[str, PackedLM]:
        return {"policy": self.policy} | ({"teacher": self.teacher} if self.teacher is not None else {})


def save(folder: Path, step: int, training: Training, keep: int = 0, keep_every: int = 0) -> Path:
    """Write folder/step-N for the state after N steps, and point folder/latest to it. All processes must call this.

    Older checkpoints are removed, but for the last `keep` (0: none are) and every `keep_every`-th step.

    Raises:
        UserError: weights that are not finite, or a full disk, say; the checkpoints before are untouched.
    """
    for name, model in training.models().items():
        finite = all(bool(distributed.local_shard(weight).isfinite().all()) for weight in model.parameters())
        if not all(distributed.all_gather([finite])):
            raise UserError(f"the {name}'s weights are not finite after {step} steps, and are not saved: lower --lr")
    whole = training.settings.get("run", {}).get("save") != "policy"
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.incomplete"
    try:
        distributed.run_on_rank0(partial(begin, aside))
        for name, model in training.models().items() if whole else [("policy", training.policy)]:
            weights = gathered(model.lm.state_dict(keep_vars=True))
            distributed.run_on_rank0(partial(model.lm.save_pretrained, aside / name, state_dict=weights))
            distributed.run_on_rank0(partial(training.tokenizer.save_pretrained, aside / name))
        adam = training.optimizer.state  # of the weights that have had a gradient
        states = {name: adam[weight] for name, weight in training.policy.lm.named_parameters() if weight in adam}
        for moment in MOMENTS if whole else ():
            moments = gathered({name: state[moment] for name, state in states.items()})
            distributed.run_on_rank0(partial(save_file, moments, aside / "optimizer" / f"{moment}.safetensors"))
        trainer = {"step": step, "settings": training.settings, "questions": training.questions}
        trainer["optimizer_steps"] = max((float(state["step"]) for state in states.values()), default=0.0)
        distributed.run_on_rank0(partial(finish, aside, final, trainer))
        distributed.run_on_rank0(partial(prune, final, keep, keep_every))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {final} could not be written ({str(error).splitlines()[0]}): make room, then go on with "
            "--resume auto; those before it are intact"
        ) from error
    return final


def begin(aside: Path) -> None:
    for left_over in aside.parent.glob("*.incomplete"):
        remove(left_over)
    (aside / "optimizer").mkdir(parents=True)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors together from all shards, one at a time, in the CPU memory of rank 0; a tied weight once."""
    whole: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in whole:
            full = distributed.full_tensor(tensor.detach())
            whole[id(tensor)] = full.cpu().contiguous() if distributed.is_rank0() else full.new_empty(0)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()}


def finish(aside: Path, final: Path, trainer: dict[str, Any]) -> None:
    """Commit a checkpoint: write its manifest, sync, rename."""
    (aside / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")
    (aside / "manifest.json").write_text(json.dumps(manifest_of(aside), indent=2) + "\n")
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    if final.exists():
        final.rename(final.with_suffix(".replaced.incomplete"))
    aside.rename(final)
    sync(final.parent)
    latest = final.parent / "latest"
    if latest.is_dir() and not latest.is_symlink():  # the run's folder was copied by something that follows links
        latest.rename(latest.with_suffix(".copied.incomplete"))
    link = final.parent / "latest.incomplete"
    link.symlink_to(final.name)
    os.replace(link, latest)
    for left_over in final.parent.glob("*.incomplete"):
        remove(left_over)


def sync(path: Path) -> None:
    """Bring a file from the page cache to the disk: a machine that loses its power loses no checkpoint."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_of(folder: Path) -> dict[str, list[Any]]:
    """Return {file: [bytes, SHA-256]} for all files but the manifest."""

    def describe_file(path: Path) -> list[Any]:
        with path.open("rb") as stream:
            return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(describe_file, files), strict=True))


def prune(written: Path, keep: int, keep_every: int) -> None:
    """Remove older checkpoints; never the one just written, also where an earlier run has left newer ones."""
    for old in newest_first(written.parent)[keep:] if keep else []:
        if old != written and (not keep_every or step_of(old) % keep_every):
            remove(old.rename(old.with_suffix(".incomplete")))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_first(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(resume: str, out: str | None) -> Path | None:
    """Find the checkpoint that --resume names; of a run, the newest intact one.

    `auto` means the run in --out, and None if that has no checkpoint yet: one command starts a run and continues it.
    """
    is_run = any((Path(resume) / inside).exists() for inside in ("checkpoints", "config.json"))
    if resume != "auto" and not is_run:
        if fault := verify(Path(resume)):
            raise UserError(f"--resume {resume}: {fault}")
        return Path(resume).resolve()
    run = out if resume == "auto" else resume
    if run is None:
        raise UserError("--resume auto: say of which run, with --out runs/NAME")
    candidates = newest_first(Path(run) / "checkpoints")
    for path in candidates:
        if not (fault := verify(path)):
            return path.resolve()
        print(f"warning: {path} is passed over: {fault}", file=sys.stderr)
    if candidates:
        raise UserError(f"--resume auto: none of {len(candidates)} checkpoints in {run} is intact")
    if resume != "auto":
        raise UserError(
            f"--resume {run}: this run has no checkpoint yet; begin it again with "
            f"--config {run}/config.json --out {run} --resume auto"
        )
    return None


def verify(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, None if it is as it was written."""
    try:
        written = {**json.loads((path / "manifest.json").read_text())}
        present = manifest_of(path)
        expected = {"trainer.json", *(f"optimizer/{moment}.safetensors" for moment in MOMENTS)}
    except (OSError, ValueError, TypeError, RecursionError):
        return "it holds no checkpoint (no readable manifest.json in it)"
    for file in sorted(expected | written.keys()):
        if file not in present:
            return f"{file} is missing"
        if present[file] != written.get(file):
            return f"{file} is damaged ({present[file][0]:,} bytes; the manifest says {written.get(file)})"
    return None


def weights_fingerprint(model: Path) -> str:
    """Identify the weights in a folder by content: by a checkpoint's manifest, else by its files' sizes and times."""
    manifest = model.parent / "manifest.json"
    if manifest.is_file():
        return fingerprint(manifest.read_bytes())
    files = sorted(path for path in model.rglob("*") if path.is_file()) if model.is_dir() else []
    return fingerprint([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def differences(path: Path, settings: dict[str, dict[str, Any]]) -> str:
    """Describe the settings that differ from the checkpoint's, as a sentence's end; more steps are no difference."""
    old = by_flag(asdict(load_config(path / "trainer.json")))
    new = by_flag(settings)
    lengths = {name: old.get(name) or math.inf for name in ("--steps", "--epochs")}
    more = {name for name, n in lengths.items() if n < (new.get(name) or 0)}
    return changes(old, new, HARMLESS | more)


def restore(path: Path, training: Training) -> int:
    """Put policy, teacher and optimizer into the state of the checkpoint; return the number of steps taken."""
    try:
        saved = json.loads((path / "trainer.json").read_text())
        step = int(saved["step"])
        optimizer_steps = float(saved["optimizer_steps"])
        if not (step >= 0 and 0 <= optimizer_steps < math.inf):
            raise ValueError("a step before the first")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"--resume {path}: trainer.json is not one of this version's ({error!r})") from error
    if saved.get("questions") != training.questions:
        raise UserError(
            f"--resume {path}: the questions of {training.settings['data']['source']}, or the tokens of their prompts, "
            "have changed since; restore the file, or start a new run from the checkpoint's policy/ with --model"
        )
    try:
        for name, model in training.models().items():
            restore_model(path / name, model)
        restore_optimizer(path / "optimizer", training, optimizer_steps)
    except Exception as error:  # as it was written, but by whom: it can hold anything
        cure = "resume from another step, or start a new run from a --model that is whole"
        raise UserError(f"--resume {path} does not hold the weights of this run ({error}): {cure}") from error
    return step


def restore_model(folder: Path, model: PackedLM) -> None:
    saved: dict[str, Tensor] = {}
    if distributed.is_rank0():
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:  # reading as a model turns all dtypes into the one asked for
                kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118, no mapping
            if kinds != {"F32"}:
                raise ValueError(f"{folder.name} holds {' and '.join(sorted(kinds))}, not float32")
        saved = distributed.named_tensors(read_weights(folder, torch.float32, safetensors=True))
    mine = distributed.named_tensors(model.lm)
    distributed.fill_from_rank0(partial(read_checked, folder.name, saved.__getitem__, mine), mine)


def read_checked(what: str, read: Callable[[str], Tensor], wanted: dict[str, Tensor], name: str) -> Tensor:
    tensor = read(name)
    if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
        raise ValueError(f"{name} of {what} is {tensor.dtype} {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} of {what} is not finite")
    return tensor


def restore_optimizer(folder: Path, training: Training, steps: float) -> None:
    """Make AdamW's state, which does not exist before its first step, and fill it with what was saved."""
    named = dict(training.policy.lm.named_parameters())
    states = training.optimizer.state
    states.clear()
    for moment in MOMENTS:
        with safe_open(folder / f"{moment}.safetensors", "pt") as file:
            values = {name: torch.zeros_like(named[name]) for name in file.keys()}  # noqa: SIM118, it is no mapping
            distributed.fill_from_rank0(partial(read_checked, moment, file.get_tensor, values), values)
        for name, value in values.items():
            states[named[name]] |= {moment: value, "step": torch.tensor(steps, device=value.device)}
    for name, weight in named.items():
        if len(states.get(weight, ())) == len(MOMENTS):
            raise ValueError(f"{name} has one moment of two")
