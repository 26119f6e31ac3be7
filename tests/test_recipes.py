"""The paper's cells as files: each loads, names a variant, and fits somewhere."""

import json
import sys
from pathlib import Path

import pytest
from runs import ROOT

from baselines import choose_variant
from config import parse
from lm.memory import Hardware, fit

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory

import recipes

FILES = sorted((ROOT / "recipes").glob("*.json"))


def test_the_files_are_older_than_the_table_that_makes_them():
    assert {file.name: json.loads(file.read_text()) for file in FILES} == recipes.recipes()
    assert len(FILES) == 66 + 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_does_not_load_or_plan(file: Path):
    config = parse(["--config", str(file)])
    assert file.stem == f"{config.method.variant}-{config.model.name}-{config.data.source}"
    assert choose_variant(config.method).kl_coef in (0.005, 0.001)
    lm = memory.shape_of(str(config.model.name))
    fit(lm, config, memory.demand_of(config), Hardware(4, memory.CARDS["80"], memory.HOST))
