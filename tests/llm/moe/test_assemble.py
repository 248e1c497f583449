"""A merged model put together in memory."""

from pathlib import Path

import torch

from llm.moe.assemble import with_merged
from llm.moe.source import open_source
from tests import mixtures


def test_an_assembled_model_computes_its_merged_layers_and_shares_the_rest(tmp_path: Path) -> None:
    model = mixtures.mixture("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1])
    model.save_pretrained(tmp_path)
    layers = {
        layer: mixtures.merge_means(block, mixtures.groups(12, 5, seed=layer))
        for layer, block in mixtures.blocks_of(model).items()
    }
    found = with_merged(model, open_source(tmp_path), layers)
    assert found.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    before = mixtures.logits(model)
    assert (mixtures.logits(found) - mixtures.logits(mixtures.with_loops(model, layers))).abs().max() < 1e-5
    assert (mixtures.logits(found) - before).abs().max() > 0.01
    assert torch.isfinite(before).all()
