"""Curves: what is drawn is what was measured, and bad runs are named."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from config import UserError
from tools import plot
from tools.plot import by_name, draw, smooth


def write_run(folder: Path, *records: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_seeds_of_one_method_become_one_line(tmp_path):
    folders = [write_run(tmp_path / name, {"step": 0}) for name in ("II-seed0", "II-seed1", "II-lr-seed0-2", "gt")]
    assert {name: len(runs) for name, runs in by_name(folders).items()} == {"II": 2, "II-lr": 1, "gt": 1}


def test_the_mean_and_the_band_are_those_of_the_seeds():
    figure, axis = plt.subplots()
    runs = [[{"step": 0, "eval_accuracy": 0.2}], [{"step": 0, "eval_accuracy": 0.6}, {"step": 10, "reward": 1.0}]]
    plot.draw_metric(axis, "eval_accuracy", runs, color="red")
    assert axis.lines[0].get_xydata().tolist() == [[0, pytest.approx(0.4)]]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.2, 0.6)
    plt.close(figure)


def test_smoothing_looks_back_and_never_ahead():
    assert smooth({0: 1.0, 1: 3.0, 2: 8.0}, window=2) == {0: 1.0, 1: 2.0, 2: 5.5}


def test_a_reward_without_a_scale_does_not_flatten_the_others():
    assert plot.to_unit({0: -0.3, 1: -0.1, 2: -0.2}) == pytest.approx({0: 0.0, 1: 1.0, 2: 0.5})
    assert plot.to_unit({0: 0.25, 1: 0.75}) == {0: 0.25, 1: 0.75}
    assert plot.to_unit({0: 5.0}) == {0: 0.0}


def test_a_run_without_labels_is_drawn_without_them(tmp_path):
    record = {"step": 0, "reward": -1.0, "entropy": 0.1}
    file = draw([write_run(tmp_path / "entropy-seed0", record)], tmp_path / "new" / "curves.png")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "is not a run"), ("", "has not finished a step"), ('{"step": 0}\n{"st', "is damaged")],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        draw([tmp_path], tmp_path / "curves.png")
