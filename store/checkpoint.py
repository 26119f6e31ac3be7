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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from config import UserError, flag_name, load_config
from lm import distributed
from lm.scoring import PackedLM
from store.jsonl import changes, fingerprint

MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them

# Flags that may differ from those of the checkpoint. The last row changes rounding, as other processes do.
HARMLESS = {"--out", "--resume", "--save-every", "--keep", "--keep-every", "--tensorboard", "--wandb"}
HARMLESS |= {"--eval-data", "--eval-every", "--eval-samples", "--eval-question-column", "--eval-answer-column"}
HARMLESS |= {"--data-dir", "--activation-checkpointing", "--offload-optimizer", "--offload-teacher"}
HARMLESS |= {"--engine-memory", "--tokens-per-micro-batch"}


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


def save(folder: Path, step: int, training: Training, keep: int = 0, keep_every: int = 0) -> Path:
    """Write folder/step-N for the state after N optimizer steps, point folder/latest to it, remove older ones: all but
    the last `keep` (0: none) and every `keep_every`-th step. All processes must call this.

    Raises:
        UserError: weights that are not finite, a disk that is full, say; the checkpoints before are untouched.
    """
    finite = all(bool(distributed.local_shard(weight).isfinite().all()) for weight in training.policy.parameters())
    if not all(distributed.all_gather([finite])):
        raise UserError(f"the policy's weights are not finite after {step} steps, and are not saved: lower --lr")
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.incomplete"
    try:
        distributed.run_on_rank0(partial(begin, aside))
        for name, model in training.models().items():
            weights = gathered(model.lm.state_dict(keep_vars=True))
            distributed.run_on_rank0(partial(write_model, model, training.tokenizer, weights, aside / name))
        for moment in MOMENTS:
            values = gathered(moments_of(training, moment))
            distributed.run_on_rank0(partial(write_tensors, values, aside / "optimizer" / f"{moment}.safetensors"))
        trainer = {"step": step, "settings": training.settings, "questions": training.questions}
        trainer["optimizer_steps"] = optimizer_steps(training.optimizer)
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
    """A file, a link (and not what it points to) or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the first process's own memory, put together from all shards, one at a time; a tied weight once."""
    whole: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in whole:
            full = distributed.full_tensor(tensor.detach())
            whole[id(tensor)] = full.cpu() if distributed.is_rank0() else full.new_empty(0)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()}


def moments_of(training: Training, moment: str) -> dict[str, Tensor]:
    """Of the weights that have had a gradient."""
    states, named = training.optimizer.state, training.policy.lm.named_parameters()
    return {name: states[parameter][moment] for name, parameter in named if parameter in states}


def optimizer_steps(optimizer: torch.optim.Optimizer) -> float:
    """Those that were not skipped."""
    return max((float(state["step"]) for state in optimizer.state.values()), default=0.0)


def write_model(model: PackedLM, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor], folder: Path) -> None:
    model.lm.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def finish(aside: Path, final: Path, trainer: dict[str, Any]) -> None:
    """From here on the checkpoint exists."""
    (aside / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")
    (aside / "manifest.json").write_text(json.dumps(manifest_of(aside), indent=2) + "\n")
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    replaced, latest = final.with_suffix(".replaced.incomplete"), final.parent / "latest"
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    if latest.is_dir() and not latest.is_symlink():  # the run's folder was copied by something that follows links
        latest.rename(latest.with_suffix(".copied.incomplete"))
    link = final.parent / "latest.incomplete"
    link.symlink_to(final.name)
    os.replace(link, latest)
    for left_over in final.parent.glob("*.incomplete"):
        remove(left_over)


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


def prune(written: Path, keep: int, keep_every: int) -> None:
    """Never the checkpoint that has just been written, also where older runs have left newer ones."""
    for old in newest_first(written.parent)[keep:] if keep else []:
        if old != written and (not keep_every or step_of(old) % keep_every):
            remove(old.rename(old.with_suffix(".incomplete")))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(resume: str, out: str | None) -> Path | None:
    """The checkpoint that --resume names, of a run the newest intact one; `auto` is that of the run in --out, or None
    if it has none yet, so that one command both starts a run and continues it."""
    if resume != "auto" and (Path(resume) / "checkpoints").is_dir():
        resume, out = "auto", resume
    if resume != "auto":
        if fault := verify(Path(resume)):
            raise UserError(f"--resume {resume}: {fault}")
        return Path(resume).resolve()
    if out is None:
        raise UserError("--resume auto: say of which run, with --out runs/NAME")
    candidates = newest_first(Path(out) / "checkpoints")
    for path in candidates:
        if not (fault := verify(path)):
            return path.resolve()
        print(f"warning: {path} is passed over: {fault}", file=sys.stderr)
    if candidates:
        raise UserError(f"--resume auto: none of {len(candidates)} checkpoints in {out} is intact")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written."""
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
    """Of these settings from those of the checkpoint, as a sentence's end; more steps are none."""
    before = asdict(load_config(path / "trainer.json"))
    old, new = (
        {flag_name(name): value for group in groups.values() for name, value in group.items()}
        for groups in (before, settings)
    )
    lengths = {name: old.get(name) or math.inf for name in ("--steps", "--epochs")}
    more = {name for name, n in lengths.items() if isinstance(n, int | float) and n < (new.get(name) or 0)}
    return changes(old, new, HARMLESS | more)


def restore(path: Path, training: Training) -> int:
    """Put policy, teacher and optimizer into the state of the checkpoint; returns the number of steps taken."""
    try:
        saved = json.loads((path / "trainer.json").read_text())
        step, optimizer_steps, questions = int(saved["step"]), float(saved["optimizer_steps"]), saved["questions"]
        if step < 0:
            raise ValueError("a step before the first")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"--resume {path}: trainer.json is not one of this version's ({error!r})") from error
    if questions != training.questions:
        raise UserError(
            f"--resume {path}: the questions of {training.settings['data']['source']}, or the tokens of their prompts, "
            "have changed since; restore the file, or start a new run from the checkpoint's policy/ with --model"
        )
    try:
        for name, model in training.models().items():
            restore_model(path / name, model)
        restore_optimizer(path / "optimizer", training, optimizer_steps)
    except Exception as error:  # as it was written, but by whom: it can hold anything
        raise UserError(f"--resume {path} does not hold the weights of this run ({error!r})") from error
    return step


def restore_model(folder: Path, model: PackedLM) -> None:
    """The first process reads, and gives the others their shards."""

    def read() -> dict[str, Tensor]:
        how = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        return distributed.named_tensors(AutoModelForCausalLM.from_pretrained(folder, **how))

    distributed.fill_from_rank0(
        read().__getitem__ if distributed.is_rank0() else None, distributed.named_tensors(model.lm)
    )


def restore_optimizer(folder: Path, training: Training, steps: float) -> None:
    """AdamW's state, which does not exist before its first step, made and filled with what was saved."""
    named, states = dict(training.policy.lm.named_parameters()), dict[str, dict[str, Tensor]]()
    for moment in MOMENTS:
        with safe_open(folder / f"{moment}.safetensors", "pt") as file:
            values = {name: torch.zeros_like(named[name]) for name in file.keys()}  # noqa: SIM118, it is no mapping
            distributed.fill_from_rank0(file.get_tensor if distributed.is_rank0() else None, values)
        for name, value in values.items():
            states.setdefault(name, {"step": torch.tensor(steps)})[moment] = value
    state = {i: states[name] for i, name in enumerate(named) if name in states}
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
