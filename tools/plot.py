"""Curves of one run or a comparison of several (store/curves.py).

    python -m tools.plot runs/II-embedded-seed0 runs/entropy-embedded-seed0 --out comparison.png

Runs whose settings differ only in their seed are drawn as one line, their mean, inside a band from lowest to highest.
"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from config import exit_on_user_error
from store.curves import draw


def main(runs: Positional[list[Path]], out: Path = Path("curves.png"), title: str = "") -> None:
    print(f"written: {draw(runs, out, title)}")


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(main, description=__doc__, prog="python -m tools.plot")
