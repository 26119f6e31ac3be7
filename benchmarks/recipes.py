"""The paper's cells as settings: a file for each method, model and training set, of which a checkpoint was published.

    python benchmarks/recipes.py                        # writes recipes/*.json
    for r in recipes/II-*.json; do torchrun --nproc-per-node 4 --shutdown-timeout 900 train.py --config $r; done

66 cells are in the authors' README (github.com/tmlr-group/Co-rewarding at 6c60ea4), six of III in that of the ICLR
version. A checkpoint's name is TMLR-Group-HF/METHOD-MODEL-SET. Steps are the authors': whole batches of three epochs.
"""

import json
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STEPS = {"math": 174, "dapo": 330, "open-rs": 162}
SETS = {"math": "MATH", "dapo": "DAPO14k", "open-rs": "OpenRS"}  # as the checkpoints are called
METHODS = {
    "I": "Co-rewarding-I",
    "II": "Co-rewarding-II",
    "gt": "GT",
    "majority": "Majority-Voting",
    "self-certainty": "Self-Certainty",
    "entropy": "Entropy",
}
CELLS = {
    "Qwen3-8B-Base": ("math", "dapo", "open-rs"),
    "Qwen3-4B-Base": ("math", "dapo", "open-rs"),
    "Qwen3-1.7B-Base": ("math",),
    "Qwen2.5-7B": ("math",),
    "Qwen2.5-3B": ("math",),
    "Llama-3.2-3B-Instruct": ("math", "dapo"),
}
CELLS_OF_III = dict.fromkeys(("Qwen3-8B-Base", "Qwen3-4B-Base", "Llama-3.2-3B-Instruct"), ("math", "dapo"))


def recipes() -> dict[str, dict[str, object]]:
    """Return the settings of each cell by the name of its file; what is not named has the paper's defaults."""
    cells = [(method, model, source) for method in METHODS for model in CELLS for source in CELLS[model]]
    cells += [("III", model, source) for model in CELLS_OF_III for source in CELLS_OF_III[model]]
    found: dict[str, dict[str, object]] = {}
    for method, model, source in cells:
        found[f"{method}-{model}-{source}.json"] = {
            "method": {"variant": method},
            "data": {"source": source, "eval_data": "math500"},
            "model": {"name": model},
            "sampling": {},
            "optimisation": {"steps": STEPS[source]},
            "memory": {},
            "run": {},
        }
    return found


if __name__ == "__main__":
    RECIPES.mkdir(exist_ok=True)
    for name, settings in recipes().items():
        (RECIPES / name).write_text(json.dumps(settings, indent=1) + "\n")
