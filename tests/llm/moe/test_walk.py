"""A walk through the layers on disk ends where the model in memory does."""

from pathlib import Path

import pytest
import torch

from llm.moe.source import open_source
from llm.moe.walk import start_walk
from tests import mixtures

BLOCKS = mixtures.tokens(rows=3, length=24)


@pytest.mark.parametrize("architecture", mixtures.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_behind_the_last_layer_are_those_of_the_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = mixtures.mixture(architecture, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    walk = start_walk(source, dict(enumerate(BLOCKS)), torch.device("cpu"))
    for index in range(source.shape.num_layers):
        walk.layer(index, source.experts(index))
    found = torch.stack([*walk.logits().values()])
    assert (found - mixtures.logits(model, BLOCKS)).abs().max() < 1e-5
