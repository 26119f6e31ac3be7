"""The miniature study: every variant on the embedded task, with the settings of `python train.py`, none tuned.

    python benchmarks/study.py                       # 7 variants x 2 seeds, about 25 minutes on one core
    python benchmarks/study.py --seeds 0 1 2 3 --jobs 2

Writes docs/study.png and docs/STUDY.md; runs that are already there are not repeated.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import plot
from rewards import VARIANTS
from word_problems import word_problems

HEAD = """# The embedded study

Every variant on the embedded task (`python train.py --variant NAME --seed SEED`), same settings for all, none tuned.
Made by `python benchmarks/study.py`; mean of {seeds} seeds, in brackets lowest and highest. Sampled: temperature 1.
Held-out: {questions} questions on problems that occur in training in none of their wordings; the standard error of an
accuracy is about 0.02. "Commonest answer": share of the most frequent answer among all answers to the *different*
questions of a step. The last three columns: mean of the last five steps.

What it shows: the intrinsic rewards rise to their maximum while accuracy falls to nothing, and the share of the
commonest answer gives it away. What it does not show: new arithmetic being learnt. Greedy decoding is right from the
start, so what rises in the others is sharpening; and differences of a few points between them are within the noise of
so few seeds.

![curves](study.png)

| variant | sampled before | sampled after | greedy before | greedy after | label accuracy | reward | commonest answer |
|---|---|---|---|---|---|---|---|
"""


def run(variant: str, seed: int, runs: Path) -> Path:
    folder = runs / f"{variant}-seed{seed}"
    if not (folder / "curves.png").exists():
        command = [sys.executable, "train.py", "--variant", variant, "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(f"done: {folder.name}", flush=True)
    return folder


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{fmean(known):.2f} ({min(known):.2f}-{max(known):.2f})"


def row(variant: str, folders: list[Path]) -> str:
    histories = [plot.read_run(folder) for folder in folders]

    def at(key: str, last: int | None) -> list[float | None]:
        """The first value, or the mean of the `last` ones."""
        series = [[record[key] for record in history if key in record] for history in histories]
        return [None if not values else values[0] if last is None else fmean(values[-last:]) for values in series]

    cells = [at("eval_accuracy", None), at("eval_accuracy", 1), at("eval_accuracy/greedy", None)]
    cells += [at("eval_accuracy/greedy", 1), at("label_accuracy", 5), at("reward", 5), at("commonest_answer", 5)]
    return f"| {variant} | " + " | ".join(spread(cell) for cell in cells) + " |"


def main(seeds: tuple[int, ...] = (0, 1), runs: Path = ROOT / "runs" / "study", jobs: int = 1) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        folders = {variant: [pool.submit(run, variant, seed, runs) for seed in seeds] for variant in VARIANTS}
        finished = {variant: [future.result() for future in futures] for variant, futures in folders.items()}
    plot.draw([folder for group in finished.values() for folder in group], ROOT / "docs" / "study.png")
    questions = len(word_problems("held-out"))
    table = [row(variant, group) for variant, group in finished.items()]
    (ROOT / "docs" / "STUDY.md").write_text(
        HEAD.format(seeds=len(seeds), questions=questions) + "\n".join(table) + "\n"
    )
    print("\n".join(table))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
