"""The consistency filter and the probabilities of groups of digits, against one-hot products and brute force."""

import pytest
import torch
from torch import Tensor

from llm.diffusion import groups
from llm.diffusion.codec import Codec, build_codec

CODECS = {
    "one digit": build_codec(7, 1),
    "holes": build_codec(3, 2),
    "binary shuffled": build_codec(50, 6, shuffle_seed=1, scope="all_codes"),
    "ternary": build_codec(23, 3, shuffle_seed=2),
    "two wide digits": build_codec(5000, 2, shuffle_seed=3),
}
SMALL = [name for name in CODECS if name != "two wide digits"]


def case(codec: Codec, count: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [P, V], tokens [P], mask [P, l] (every degree of it), revealed digits [P, l]."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(count, codec.vocab_size, generator=generator, dtype=dtype) * 2
    tokens = torch.randint(codec.vocab_size, (count,), generator=generator)
    mask = torch.rand(count, codec.granularity, generator=generator) < torch.linspace(0, 1, count).unsqueeze(-1)
    mask[-1] = True
    return logits, tokens, mask, torch.where(mask, codec.mask_symbol, codec.encode(tokens))


def consistent_by_one_hot_product(revealed: Tensor, codec: Codec) -> Tensor:
    visible = revealed != codec.mask_symbol
    rows = torch.nn.functional.one_hot(revealed * visible, codec.base) * visible.unsqueeze(-1)
    agreements = rows.flatten(1).float() @ codec.one_hot.T
    return agreements == visible.sum(-1, keepdim=True)


def test_the_filter_of_a_vocabulary_with_holes():
    codec, logits = CODECS["holes"], torch.tensor([[0.3, -0.2, 1.1]], dtype=torch.float64)
    raw = logits.softmax(-1)[0].tolist()

    def probs(*digits: int) -> list[float]:
        return groups.filtered_log_probs(logits, torch.tensor([digits]), codec).exp()[0].tolist()

    assert probs(1, 2) == [0.0, 0.0, 1.0]
    assert probs(2, 1) == [0.0, 1.0, 0.0]
    assert probs(2, 2) == pytest.approx(raw, abs=1e-15)
    assert probs(0, 2) == pytest.approx([raw[0] / (raw[0] + raw[1]), raw[1] / (raw[0] + raw[1]), 0.0], abs=1e-15)
    assert probs(1, 0) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", CODECS)
def test_the_filter_keeps_the_true_token_agrees_with_one_hot_products_and_normalises(name: str):
    codec = CODECS[name]
    logits, tokens, _, revealed = case(codec)
    allowed = groups.consistent(revealed, codec)
    assert torch.equal(allowed, consistent_by_one_hot_product(revealed, codec))
    assert allowed[torch.arange(len(tokens)), tokens].all()
    probs = groups.filtered_log_probs(logits, revealed, codec).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(tokens), dtype=torch.float64))
    assert (probs[~allowed] == 0).all()


def test_the_filter_of_a_binary_code_is_xor_and_and():
    codec = build_codec(50257, 16, shuffle_seed=0)
    _, tokens, mask, revealed = case(codec, count=6)
    number = (codec.codes * 2 ** torch.arange(15, -1, -1)).sum(-1)
    visible = ((~mask).long() * 2 ** torch.arange(15, -1, -1)).sum(-1, keepdim=True)
    assert torch.equal(groups.consistent(revealed, codec), ((number ^ number[tokens].unsqueeze(-1)) & visible) == 0)


@pytest.mark.parametrize("name", CODECS)
def test_all_ways_to_the_probability_of_a_digit_agree(name: str):
    codec = CODECS[name]
    logits, tokens, mask, revealed = case(codec)
    log_token, log_digits = groups.true_log_probs(logits, revealed, tokens, codec)
    log_probs = groups.filtered_log_probs(logits, revealed, codec)
    torch.testing.assert_close(log_token, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(log_token, groups.token_log_prob(logits, revealed, tokens, codec))
    torch.testing.assert_close(log_token, groups.group_log_prob(logits, revealed, tokens, mask, codec))

    by_value = groups.digit_log_probs(logits, revealed, codec)  # [P, l, b]
    true = codec.encode(tokens).unsqueeze(-1)
    torch.testing.assert_close(log_digits, by_value.gather(-1, true).squeeze(-1))
    torch.testing.assert_close(by_value.exp().sum(-1), torch.ones_like(log_digits))
    for j in range(codec.granularity):
        group = torch.zeros_like(mask)
        group[:, j] = True
        brute = torch.stack([log_probs[p, codec.codes[:, j] == true[p, j]].logsumexp(-1) for p in range(len(tokens))])
        torch.testing.assert_close(log_digits[:, j], brute)
        torch.testing.assert_close(groups.group_log_prob(logits, revealed, tokens, group, codec), brute)


def test_a_group_of_several_digits_has_the_mass_of_the_tokens_that_agree():
    codec = CODECS["ternary"]
    logits, tokens, mask, revealed = case(codec)
    group = torch.tensor([True, False, True]).expand_as(mask)
    log_probs = groups.filtered_log_probs(logits, revealed, codec)
    agrees = (codec.codes[None, :, [0, 2]] == codec.encode(tokens)[:, None, [0, 2]]).all(-1)
    expected = log_probs.masked_fill(~agrees, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(groups.group_log_prob(logits, revealed, tokens, group, codec), expected)


@pytest.mark.parametrize("name", CODECS)
def test_single_precision_and_bfloat16_logits_are_summed_in_float32(name: str):
    codec = CODECS[name]
    logits, tokens, _, revealed = case(codec)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = logits.to(dtype)
        got = groups.true_log_probs(rounded, revealed, tokens, codec)
        exact = groups.true_log_probs(rounded.double(), revealed, tokens, codec)
        for values, reference in zip(got, exact, strict=True):
            assert values.dtype == torch.float32
            torch.testing.assert_close(values.double(), reference, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_the_backward_pass_agrees_with_finite_differences(name: str, filtered: bool):
    codec = CODECS[name]
    logits, tokens, _, revealed = case(codec, count=5)

    def outputs(z: Tensor) -> tuple[Tensor, Tensor]:
        return groups.true_log_probs(z, revealed if filtered else None, tokens, codec)

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-6)


def test_the_backward_pass_of_wide_digits_agrees_with_that_of_logsumexp():
    codec = CODECS["two wide digits"]
    logits, tokens, mask, revealed = case(codec)
    factor = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for digits in (
        lambda z: groups.true_log_probs(z, revealed, tokens, codec)[1],
        lambda z: torch.stack(
            [groups.group_log_prob(z, revealed, tokens, torch.arange(2).expand_as(mask) == j, codec) for j in range(2)],
            dim=-1,
        ),
    ):
        z = logits.clone().requires_grad_()
        (digits(z) * factor).sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_the_gradient_of_the_filtered_cross_entropy_is_p_minus_one_hot_inside_the_filter_and_zero_outside():
    codec = CODECS["ternary"]
    logits, tokens, mask, revealed = case(codec)
    logits.requires_grad_()
    (-groups.token_log_prob(logits, revealed, tokens, codec)).sum().backward()
    probs = groups.filtered_log_probs(logits.detach(), revealed, codec).exp()
    one_hot = torch.nn.functional.one_hot(tokens, codec.vocab_size)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, probs - one_hot)
    assert (logits.grad[~groups.consistent(revealed, codec)] == 0).all()
    assert (~mask).all(-1).any() and (logits.grad[(~mask).all(-1)] == 0).all()


@pytest.mark.parametrize("gap", [60.0, 80.0, 95.0, 300.0])
@pytest.mark.parametrize("name", ["holes", "binary shuffled", "two wide digits"])
def test_a_digit_whose_mass_underflows_costs_a_finite_amount_and_pulls_the_true_token_up(name: str, gap: float):
    codec = CODECS[name]
    tokens = torch.tensor([1])
    logits = torch.zeros(1, codec.vocab_size)
    other = int((codec.codes != codec.codes[1]).sum(-1).argmax())  # the token that shares the fewest digits
    logits[0, other] = gap
    logits.requires_grad_()
    hidden = torch.full((1, codec.granularity), codec.mask_symbol)
    _, log_digits = groups.true_log_probs(logits, hidden, tokens, codec)
    exact = groups.true_log_probs(logits.detach().double(), hidden, tokens, codec)[1]
    differs = codec.codes[other] != codec.codes[1]
    assert (log_digits.double() <= exact + 1e-5).all()  # so that a bound stays a bound
    torch.testing.assert_close(log_digits.double(), exact if gap < 69 else torch.where(differs, -gap, exact))
    (-1000.0 * log_digits).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert float(logits.grad[0, 1]) < 0 and float(logits.grad[0, other]) == pytest.approx(1000.0 * float(differs.sum()))
