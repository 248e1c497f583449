"""Numbers that cannot work are refused with the value, the limit and a remedy."""

import pytest

from launch.errors import ConfigError
from llm.backbones import InputSpec, ModelConfig, build

GOOD = {"layers": 2, "heads": 4, "width": 32}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"width": 30}, r"m\.width = 30 .* 2 x m\.heads = 8.*use width 32"),
        ({"width": 36}, r"m\.width = 36 .*one even size"),
        ({"kv_heads": 3}, r"m\.kv_heads = 3 does not divide m\.heads = 4; use one of 1, 2, 4"),
        ({"kv_heads": 0}, r"m\.kv_heads = 0 must be at least 1"),
        ({"ffn": 0}, r"m\.ffn = 0 must be at least 1"),
        ({"layers": 0}, r"m\.layers = 0 must be at least 1"),
        ({"dropout": 1.0}, r"m\.dropout = 1\.0 is outside"),
        ({"norm_eps": 0.0}, r"m\.norm_eps = 0\.0 must be above 0"),
        ({"init": "mdlm"}, r"m\.init = 'mdlm' is not defined for m\.kind = 'llama'; use 'tinyllama' or 'megatron'"),
        ({"kind": "dit"}, r"m\.init = 'tinyllama' is not defined for m\.kind = 'dit'; use 'mdlm'"),
        ({"kind": "dit", "init": "mdlm", "tied": True}, r"m\.tied = true does not go with m\.kind = 'dit'"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**GOOD | numbers).check("m")


@pytest.mark.parametrize(
    ("numbers", "spec", "message"),
    [
        ({"tied": True}, {"kind": "sum", "num_symbols": 3, "granularity": 4}, "model.tied = true needs a token table"),
        ({"tied": True}, {"num_symbols": 10}, "a row .* for each of the 11 classes, and it has 10"),
        (
            {},
            {"kind": "cat-share", "num_symbols": 3, "granularity": 5},
            "width = 32 is not a multiple .* granularity 5",
        ),
        ({}, {"kind": "cat", "num_symbols": 3, "granularity": 33}, "width = 32 is below the granularity 33"),
        ({}, {"kind": "cat", "num_symbols": 3}, "input.granularity = 1 does not go with input.kind = 'cat'"),
        ({}, {"num_symbols": 12, "granularity": 4}, "input.granularity = 4 does not go with input.kind = 'token'"),
        ({}, {"num_symbols": 0}, "input.num_symbols = 0"),
    ],
)
def test_inputs_that_contradict_the_model_are_refused(numbers, spec, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig(**GOOD | numbers), input_layer=InputSpec(**spec), num_classes=11, causal=False)
