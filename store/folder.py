"""The folder of a run: a new one or that of a run to go on with, and no other run's meanwhile."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from config import Config, UserError
from lm import distributed
from store import checkpoint


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a folder and keep others out of it for as long as this process lives, however it ends.

    Raises:
        UserError: somebody else writes to it, or it cannot be written.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing to it; wait for it, or name another --out") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({error.strerror}); name another --out") from error
        held.callback(remove_if_empty, folder)
        yield


@contextmanager
def lock_run_dir(config: Config) -> Iterator[tuple[Path, Path | None]]:
    """Find and lock the run's folder; yield it, and the checkpoint to go on from if there is one."""

    def claim(held: ExitStack) -> tuple[Path, Path | None]:
        folder, resumed = folder_of(config)
        held.enter_context(lock(folder))
        return folder, resumed

    with ExitStack() as held:
        yield distributed.run_on_rank0(lambda: claim(held))


def folder_of(config: Config) -> tuple[Path, Path | None]:
    """Decide where this run writes: in a new folder, or in its own with the checkpoint that it goes on from."""
    resume = config.run.resume
    out = config.run.out
    resumed = checkpoint.find_checkpoint(resume, out) if resume else None
    if resumed is None:
        return new_folder(config), None
    if differing := checkpoint.differences(resumed, asdict(config)):
        fewer = "; fewer steps are refused" if "--steps" in differing or "--epochs" in differing else ""
        cure = f"leave these out{fewer}, or start a new run from the checkpoint's policy/ with --model"
        raise UserError(f"--resume {resume}: made with other settings: {differing}; {cure}")
    run = resumed.parents[1]
    saved = checkpoint.newest_first(run / "checkpoints")
    elsewhere = out is not None and Path(out).resolve() != run
    is_older = resumed not in saved or (Path(str(resume)).resolve() == resumed and resumed != saved[0])
    if elsewhere or is_older:
        cure = "start another run from its policy/ with --model"
        raise UserError(f"--resume {resume} is not the newest checkpoint of the run in {out or run}: {cure}")
    return run, resumed


def new_folder(config: Config) -> Path:
    """Find a folder that no other run has written to, or one to resume in from the very beginning."""
    if config.run.out:
        folder = Path(config.run.out)
        if (folder / "metrics.jsonl").exists() and config.run.resume != "auto":
            raise UserError(f"--out {folder} holds a run: continue it with --resume auto, or name another folder")
        return folder
    names = [Path(str(name)).name.partition(".")[0][:60] for name in (config.model.name, config.data.source)]
    stem = "-".join([config.method.variant, *dict.fromkeys(names), f"seed{config.run.seed}"])
    for suffix in ("", *(f"-{i}" for i in range(2, 10_000))):
        folder = Path("runs", stem + suffix)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)  # of two runs that start at once, one makes it
            return folder
    raise UserError("runs/ is full of runs of this name: name another folder with --out")


def remove_if_empty(folder: Path) -> None:
    """Leave nothing behind where nothing was written; a folder that is gone hides no other error."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()
            if folder.parent == Path("runs"):
                folder.parent.rmdir()  # fails where another run is
