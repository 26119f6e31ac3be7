"""Curves of one run or a comparison of several (store/curves.py).

    python -m tools.plot runs/II-embedded-seed0 runs/entropy-embedded-seed0 --out comparison.png

Runs whose settings differ only in their seed are drawn as one line, their mean, inside a band from lowest to highest.
"""

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from config import UserError
from store.curves import draw


def main(runs: Positional[list[Path]], out: Path = Path("curves.png"), title: str = "") -> None:
    """Draw what README tells people to watch, of runs or of anything in their folders, against training steps."""
    try:
        print(f"written: {draw(runs, out, title)}")
    except (UserError, OSError, ValueError) as problem:  # a place that cannot be written, a format that nobody knows
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
