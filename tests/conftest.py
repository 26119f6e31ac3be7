from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, tiny_lm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes longer than the few steps of a test's run: only tests marked `draws` make one."""
    if "draws" not in request.keywords:
        monkeypatch.setattr("train.curves", SimpleNamespace(draw=lambda folders, file: file))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


SHAPES = [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("qwen3", True)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}-{'tied' if shape[1] else 'untied'}")
def any_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every shape that the paper trains, in miniature."""
    family, tied = request.param
    return tiny_lm(family, tied)
