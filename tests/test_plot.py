"""Curves: what is drawn is what was measured, and bad runs are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from config import UserError
from store import curves
from store.curves import draw, histories_by_settings


def write_run(folder: Path, *records: dict[str, float], **settings: object) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"method": {"variant": "II"}, "optimisation": {"lr": 1e-3}, "run": {"seed": 0, "out": str(folder)}}
    for name, value in settings.items():
        next(group for group in config.values() if name in group)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_seeds_of_one_method_become_one_line_whatever_their_folders_are_called(tmp_path: Path) -> None:
    step = {"step": 0}
    folders = [
        write_run(tmp_path / "monday", step),
        write_run(tmp_path / "tuesday", step, seed=1),
        write_run(tmp_path / "II-seed2", step, lr=1e-4),
        write_run(tmp_path / "gt", step, variant="gt"),
    ]
    assert {label: len(runs) for label, runs in histories_by_settings(folders).items()} == {
        "II --lr 0.001": 2,
        "II --lr 0.0001": 1,
        "gt --lr 0.001": 1,
    }
    assert list(histories_by_settings([folders[0], folders[3]])) == ["II", "gt"], "what does not differ needs no words"


def test_a_run_that_is_named_twice_is_drawn_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"step": 0})
    assert [len(runs) for runs in histories_by_settings([run, run]).values()] == [1]


def test_the_mean_and_the_band_are_those_of_the_seeds_to_the_end_of_the_longest() -> None:
    axis = Figure().subplots()
    short = [{"step": 0, "eval_accuracy": 0.2}]
    long = [{"step": 0, "eval_accuracy": 0.6}, {"step": 5, "reward": 1.0}, {"step": 10, "eval_accuracy": 0.8}]
    curves.draw_metric(axis, "eval_accuracy", [short, long], color="red")
    assert axis.lines[0].get_xydata().tolist() == [[0, pytest.approx(0.4)], [10, pytest.approx(0.8)]]
    band = axis.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0, 0.2), (0, 0.6), (10, 0.8)}


def test_smoothing_looks_back_and_never_ahead_and_leaves_evaluations_alone() -> None:
    axis = Figure().subplots()
    values = [1.0, 3.0, 8.0, 0.0, 0.0, 4.0]
    history = [{"step": step, "reward": value, "eval_accuracy": value} for step, value in enumerate(values)]
    curves.draw_metric(axis, "reward", [history], color="red")
    curves.draw_metric(axis, "eval_accuracy", [history], color="red")
    smooth, raw = (line.get_ydata().tolist() for line in axis.lines)
    assert smooth == pytest.approx([1.0, 2.0, 4.0, 3.0, 2.4, 3.0]) and raw == values
    assert not axis.collections, "a band around one run"


def test_a_run_without_labels_is_drawn_without_them(tmp_path: Path) -> None:
    record = {"step": 0, "reward": -1.0, "entropy": 0.1}
    file = draw([write_run(tmp_path / "run", record)], tmp_path / "new" / "curves.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_is_named_and_a_reward_of_another_scale_leaves_the_others_legible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    votes = write_run(tmp_path / "votes", {"step": 0, "reward": 0.5, "label_accuracy": 1.0})
    certain = write_run(tmp_path / "certain", {"step": 0, "reward": 14.0}, variant="self-certainty")
    draw([votes], tmp_path / "one.png")
    draw([votes, certain], tmp_path / "two.png")
    one, two = figures
    assert [axis.get_title() for axis in two.axes] == list(curves.PANELS.values()) and len(two.axes) == 8
    assert [text.get_text() for text in two.legends[0].get_texts()] == ["II", "self-certainty"]
    assert [[line.get_label() for line in axis.lines] for axis in two.axes[1:3]] == [["II"], ["II", "self-certainty"]]
    assert [text.get_text() for text in two.axes[0].texts] == ["not measured"] and not two.axes[1].texts
    assert (one.axes[2].get_yscale(), two.axes[2].get_yscale()) == ("linear", "symlog")


def test_an_empty_run_does_not_keep_the_others_from_being_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty, full = write_run(tmp_path / "empty"), write_run(tmp_path / "full", {"step": 0}, variant="gt")
    assert list(histories_by_settings([empty, full])) == ["gt"]
    assert "empty: left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to draw"):
        draw([empty], tmp_path / "curves.png")


@pytest.mark.parametrize(("content", "sentence"), [(None, "is not a run"), ('{"step": 0}\n{"st\n', "damaged")])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        draw([tmp_path], tmp_path / "curves.png")


def test_a_damaged_config_is_a_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"step": 0})
    for content in ("{", "[]", '{"method": 1}'):
        (run / "config.json").write_text(content)
        with pytest.raises(UserError, match="config.json is missing or damaged"):
            histories_by_settings([run])


@pytest.mark.parametrize("out", ["curves.xyz", "run/metrics.jsonl/curves.png"])
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, out: str) -> None:
    run = write_run(tmp_path / "run", {"step": 0})
    command = [sys.executable, "-m", "tools.plot", str(run), "--out", str(tmp_path / out)]
    root = Path(curves.__file__).parents[1]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    assert result.returncode == 2 and "was not written" in result.stderr and result.stderr.count("\n") == 1


def test_importing_curves_for_training_does_not_import_matplotlib() -> None:
    script = "import sys, store.curves; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(curves.__file__).parents[1])
