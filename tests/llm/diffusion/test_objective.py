"""The training objectives: exact charges, mixtures, the l = 1 case, and a short training run on known data."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llm.diffusion import likelihood, masking, objective
from llm.diffusion.codec import Codec, build_codec
from llm.diffusion.objective import MaskedBatch, MaskedObjective
from tests.llm.diffusion import enumeration as exact


class TinyModel(nn.Module):
    """A bidirectional transformer over tokens whose embeddings are the sums of their digits'."""

    def __init__(self, codec: Codec, length: int, width: int = 32, layers: int = 2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.digits = nn.ModuleList(nn.Embedding(codec.base + 1, width) for _ in range(codec.granularity))
            self.place = nn.Parameter(torch.randn(length, width))
            layer = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True, norm_first=True)
            self.blocks = nn.Sequential(*(layer(width, 2, 64) for _ in range(layers)))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, codec.vocab_size)

    def forward(self, digits: Tensor, readout):
        h = torch.stack([table(digits[..., j]) for j, table in enumerate(self.digits)]).sum(0) + self.place
        return readout(self.norm(self.blocks(h)), self.head.weight, self.head.bias)

    def logits(self, digits: Tensor) -> Tensor:
        return self(digits, lambda hidden, weight, bias: hidden @ weight.T + bias)


def batch_of(codec: Codec, count: int, length: int, seed: int = 0, **options: Tensor) -> MaskedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(codec.vocab_size, (count, length), generator=generator)
    noise = torch.rand(count, length, codec.granularity, generator=generator)
    times = torch.rand(count, generator=generator)
    mask = masking.random_mask(noise, times, grouped=options.get("grouped"), maskable=options.get("scored"))
    return MaskedBatch(tokens=tokens, mask=mask, times=times, **options)


def loss_and_gradients(model: TinyModel, aim: MaskedObjective, batch: MaskedBatch, codec: Codec):
    model.zero_grad()
    loss = model(batch.inputs(codec), objective.masked_readout(aim, batch, codec))
    loss.loss_sum.backward()
    return loss.loss_sum.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, loss.metrics


def test_all_masked_objectives_are_one_bit_for_bit_when_a_token_is_one_digit():
    codec = build_codec(11, 1)
    model, batch = TinyModel(codec, 6), batch_of(codec, 8, 6)
    reference, gradients, _ = loss_and_gradients(model, MaskedObjective(terms={"mdm": 1.0}), batch, codec)
    for name in ("ce_joint", "nelbo_subtoken", "nelbo_token"):
        loss, others, _ = loss_and_gradients(model, MaskedObjective(terms={name: 1.0}), batch, codec)
        assert torch.equal(loss, reference)
        assert all(torch.equal(gradients[key], others[key]) for key in gradients)


def test_the_masked_objective_is_the_textbook_one_when_a_token_is_one_digit():
    codec = build_codec(11, 1)
    model, batch = TinyModel(codec, 6), batch_of(codec, 8, 6)
    loss, gradients, metrics = loss_and_gradients(model, MaskedObjective(terms={"mdm": 1.0}), batch, codec)
    model.zero_grad()
    inputs = torch.where(batch.mask, 11, batch.tokens.unsqueeze(-1))
    ce = cross_entropy(model.logits(inputs).flatten(0, 1), batch.tokens.flatten(), reduction="none").view(8, 6)
    plain = (ce * batch.mask.squeeze(-1) / batch.times.clamp(min=1e-3).unsqueeze(-1)).sum()
    plain.backward()
    torch.testing.assert_close(loss, plain.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)
    assert int(metrics["num_tokens"]) == 48 and int(metrics["num_loss_positions"]) == int(batch.mask.sum())
    torch.testing.assert_close(metrics["nelbo_token_sum"], loss)


@pytest.mark.parametrize(("vocab_size", "granularity"), [(4, 2), (3, 2), (7, 3)])
def test_the_charge_of_every_mask_is_the_enumerated_one(vocab_size: int, granularity: int):
    codec = build_codec(vocab_size, granularity)
    model = exact.random_model(codec, 2, seed=1)
    backbone = exact.as_backbone(model, vocab_size)
    sequences = exact.all_sequences(vocab_size, 2)[:5]
    for name, cost in (("nelbo_subtoken", "digits"), ("ce_joint", "tokens")):
        aim = MaskedObjective(terms={name: 2.0}, t_min=0.5)
        for mask, expected in exact.masked_cost(cost, model, codec, sequences).items():
            hidden = torch.tensor(mask).view(1, 2, granularity).expand(5, -1, -1)
            batch = MaskedBatch(tokens=sequences, mask=hidden, times=torch.full((5,), 0.1))
            loss = backbone(batch.inputs(codec), objective.masked_readout(aim, batch, codec))
            torch.testing.assert_close(loss.loss_sum, 2.0 / 0.5 * expected.sum())
            key = "nelbo_subtoken_sum" if name == "nelbo_subtoken" else "loss_ce_joint_sum"
            torch.testing.assert_close(loss.metrics[key], expected.sum() / 0.1, rtol=1e-6, atol=0.0)


def test_a_mixture_is_the_weighted_sum_of_its_terms_from_one_forward_pass():
    codec = build_codec(50, 6, shuffle_seed=0)
    model, batch = TinyModel(codec, 5), batch_of(codec, 6, 5)
    mixed = MaskedObjective(terms={"ce_joint": 0.25, "nelbo_subtoken": 0.75})
    loss, gradients, metrics = loss_and_gradients(model, mixed, batch, codec)
    parts = [
        loss_and_gradients(model, MaskedObjective(terms={name: factor}), batch, codec)
        for name, factor in mixed.terms.items()
    ]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, parts[0][1][name] + parts[1][1][name], atol=1e-4, rtol=1e-4)
    recombined = 0.25 * metrics["loss_ce_joint_sum"] + 0.75 * metrics["nelbo_subtoken_sum"]
    assert float(batch.times.min()) > mixed.t_min  # else the loss clips a weight that the metrics do not
    torch.testing.assert_close(loss, recombined)


def test_each_bound_charges_the_sequences_masked_in_its_own_way():
    codec = build_codec(50, 6)
    grouped = torch.tensor([True, False, True, False, False, True])
    batch = batch_of(codec, 6, 5, grouped=grouped)
    model = TinyModel(codec, 5)
    both = MaskedObjective(terms={"nelbo_subtoken": 1.0, "nelbo_token": 1.0})
    loss, _, metrics = loss_and_gradients(model, both, batch, codec)
    torch.testing.assert_close(loss, metrics["nelbo_subtoken_sum"] + metrics["nelbo_token_sum"])
    assert int(metrics["num_tokens_nelbo_subtoken"]) == int(metrics["num_tokens_nelbo_token"]) == 15

    for name, rows in (("nelbo_token", grouped), ("nelbo_subtoken", ~grouped)):
        part = MaskedBatch(
            tokens=batch.tokens[rows], mask=batch.mask[rows], times=batch.times[rows], grouped=grouped[rows]
        )
        alone, _, _ = loss_and_gradients(model, MaskedObjective(terms={name: 1.0}), part, codec)
        torch.testing.assert_close(alone, metrics[f"{name}_sum"])


@pytest.mark.parametrize(("vocab_size", "granularity"), [(4, 2), (7, 3)])
def test_the_mean_of_the_layered_loss_over_times_and_masks_is_the_layered_bound(vocab_size: int, granularity: int):
    codec = build_codec(vocab_size, granularity)
    model, tokens = exact.random_model(codec, 2, seed=1), exact.all_sequences(vocab_size, 2)[:5]
    backbone = exact.as_backbone(model, vocab_size)
    aim = MaskedObjective(terms={"nelbo_layered": 1.0}, t_min=1e-9)
    aim.check(codec, can_group=False, can_split=True, in_layers=True)
    nodes, weights = np.polynomial.legendre.leggauss(4)  # exact: the integrand is a polynomial in the window's time
    total, metric = torch.zeros((), dtype=torch.float64), 0.0
    for index in range(granularity):
        for node, weight in zip((nodes + 1) / 2, weights / 2 / granularity, strict=True):
            layer, within = masking.layer_at(
                torch.full((5,), (granularity - 1 - index + node) / granularity, dtype=torch.float64), granularity
            )
            assert layer.tolist() == [index] * 5
            for mask in exact.all_masks(2):
                chance = float(node ** int(mask.sum()) * (1 - node) ** (2 - int(mask.sum())))
                hidden = masking.layered(mask.view(1, 2, 1).expand(5, -1, -1), layer, granularity)
                batch = MaskedBatch(tokens=tokens, mask=hidden, times=within, layer=layer)
                loss = backbone(batch.inputs(codec), objective.masked_readout(aim, batch, codec))
                total += weight * chance * loss.loss_sum
                metric += weight * chance * float(loss.metrics["nelbo_layered_sum"])
                assert not {"loss_ce_joint_sum", "nelbo_subtoken_sum"} & set(loss.metrics)
    expected = exact.nelbo_over_orders(model, codec, tokens, exact.layered_orders(2, granularity)).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert metric == pytest.approx(float(expected), rel=1e-6)


def test_layers_and_whole_tokens_mix_in_one_batch_each_charged_by_its_own_bound():
    codec = build_codec(50, 6)
    grouped, layer = torch.tensor([True, False, True]), torch.tensor([0, 2, 5])
    plain = batch_of(codec, 3, 5, grouped=grouped)
    by_layer = masking.layered(plain.mask[..., :1], layer, 6)
    mask = torch.where(grouped[:, None, None], plain.mask, by_layer)
    batch = MaskedBatch(tokens=plain.tokens, mask=mask, times=plain.times, grouped=grouped, layer=layer)
    both = MaskedObjective(terms={"nelbo_layered": 1.0, "nelbo_token": 1.0})
    both.check(codec, can_group=True, can_split=True, in_layers=True)
    model = TinyModel(codec, 5)
    loss, _, metrics = loss_and_gradients(model, both, batch, codec)
    torch.testing.assert_close(loss, metrics["nelbo_layered_sum"] + metrics["nelbo_token_sum"])
    alone = MaskedBatch(tokens=plain.tokens[1:2], mask=mask[1:2], times=plain.times[1:2], layer=layer[1:2])
    only, _, _ = loss_and_gradients(model, MaskedObjective(terms={"nelbo_layered": 1.0}), alone, codec)
    torch.testing.assert_close(only, metrics["nelbo_layered_sum"])


def test_the_published_recipe_charges_every_position_without_a_filter():
    codec = build_codec(50, 6)
    model, batch = TinyModel(codec, 5), batch_of(codec, 6, 5)
    recipe = MaskedObjective(terms={"ce_joint": 1.0}, carry_over=False, positions="all", weighting="none")
    loss, _, metrics = loss_and_gradients(model, recipe, batch, codec)
    plain = cross_entropy(model.logits(batch.inputs(codec)).flatten(0, 1), batch.tokens.flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain.detach())
    assert int(metrics["num_loss_positions"]) == 30


def test_with_the_filter_a_visible_token_is_free_even_when_every_position_is_charged():
    for codec in (build_codec(50, 6), build_codec(11, 1)):
        model, batch = TinyModel(codec, 5), batch_of(codec, 6, 5)
        losses = [
            loss_and_gradients(model, MaskedObjective(terms={"ce_joint": 1.0}, positions=where), batch, codec)[0]
            for where in ("masked", "all")
        ]
        torch.testing.assert_close(*losses)


def test_only_the_scored_region_counts():
    codec = build_codec(50, 6)
    scored = torch.arange(5).expand(6, 5) >= 2
    model, batch = TinyModel(codec, 5), batch_of(codec, 6, 5, scored=scored)
    _, _, metrics = loss_and_gradients(model, MaskedObjective(terms={"ce_joint": 1.0}), batch, codec)
    assert int(metrics["num_tokens"]) == 18
    assert int(metrics["num_loss_positions"]) == int(batch.mask.any(-1)[:, 2:].sum())


def test_the_gradient_of_the_bound_agrees_with_finite_differences():
    codec = build_codec(7, 3)
    batch = batch_of(codec, 3, 2, seed=4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    readout = objective.masked_readout(
        MaskedObjective(terms={"nelbo_subtoken": 1.0, "ce_joint": 0.5}, weighting="none"), batch, codec
    )
    inputs = (hidden, weight, bias)
    readout(*inputs).loss_sum.backward()
    for tensor in inputs:  # not gradcheck: it asks for the gradients twice, and the readout hands them over once
        numerical = torch.empty_like(tensor)
        flat = tensor.detach().view(-1)
        for index, value in enumerate(flat.tolist()):
            flat[index] = value + 1e-6
            above = float(readout(*inputs).loss_sum.detach())
            flat[index] = value - 1e-6
            below = float(readout(*inputs).loss_sum.detach())
            flat[index] = value
            numerical.view(-1)[index] = (above - below) / 2e-6
        torch.testing.assert_close(tensor.grad, numerical, rtol=1e-6, atol=1e-6)


def test_a_batch_in_which_nothing_is_masked_has_a_zero_loss_and_zero_gradients():
    codec = build_codec(50, 6)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    batch = MaskedBatch(tokens=tokens, mask=torch.zeros(2, 5, 6, dtype=torch.bool), times=torch.zeros(2))
    terms = {"nelbo_subtoken": 1.0}
    loss, gradients, metrics = loss_and_gradients(TinyModel(codec, 5), MaskedObjective(terms=terms), batch, codec)
    assert float(loss) == 0.0 and not any(gradient.any() for gradient in gradients.values())
    assert all(torch.isfinite(value) for value in metrics.values())


def test_the_hidden_part_of_a_masked_token_changes_nothing_but_the_charge():
    codec = build_codec(16, 4)
    model, batch = TinyModel(codec, 5), batch_of(codec, 6, 5)
    flipped = torch.where(batch.mask, (codec.encode(batch.tokens) + 1) % 2, codec.encode(batch.tokens))
    other = MaskedBatch(tokens=codec.decode(flipped), mask=batch.mask, times=batch.times)
    assert not torch.equal(other.tokens, batch.tokens)
    assert torch.equal(model.logits(other.inputs(codec)), model.logits(batch.inputs(codec)))


def test_the_autoregressive_objective_scores_every_token_behind_its_predecessors():
    tokens = torch.tensor([[3, 1, 2], [0, 4, 4]])
    assert objective.ar_inputs(tokens, bos=5).tolist() == [[5, 3, 1], [5, 0, 4]]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    loss = objective.ar_readout(tokens)(hidden, weight, None)
    expected = cross_entropy((hidden @ weight.T).flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(loss.loss_sum, expected)
    torch.testing.assert_close(loss.metrics["nll_ar_sum"], expected)
    assert int(loss.metrics["num_tokens"]) == 6
    scored = torch.tensor([[False, True, True], [False, False, True]])
    assert int(objective.ar_readout(tokens, scored=scored)(hidden, weight, None).metrics["num_tokens"]) == 3


def test_terms_that_do_not_suit_the_codec_or_the_masks_are_refused():
    one, many = build_codec(8, 1), build_codec(8, 3)
    good = [
        ({"mdm": 1.0}, one, False, True),
        ({"ce_joint": 1.0}, many, True, True),
        ({"nelbo_token": 1.0}, many, True, False),
        ({"nelbo_subtoken": 0.5, "nelbo_token": 0.5}, many, True, True),
    ]
    for terms, codec, can_group, can_split in good:
        MaskedObjective(terms=terms).check(codec, can_group=can_group, can_split=can_split)
    bad = [
        ({}, many, False, True, "use mdm"),
        ({"ar": 1.0}, many, False, True, "use mdm"),
        ({"mdm": 1.0}, many, False, True, "granularity 1, not 3"),
        ({"nelbo_token": 1.0}, many, False, True, "Raise p_group"),
        ({"nelbo_subtoken": 1.0}, many, True, False, "Lower p_group"),
        ({"nelbo_subtoken": 1.0}, many, True, True, "Add nelbo_token, or set p_group to 0"),
        ({"nelbo_token": 1.0}, many, True, True, "Add nelbo_subtoken, or set p_group to 1"),
    ]
    for terms, codec, can_group, can_split, message in bad:
        with pytest.raises(ValueError, match=message):
            MaskedObjective(terms=terms).check(codec, can_group=can_group, can_split=can_split)


@pytest.mark.parametrize(
    ("granularity", "terms"),
    [
        (1, {"mdm": 1.0}),
        (2, {"ce_joint": 1.0}),
        (2, {"nelbo_subtoken": 1.0, "nelbo_token": 1.0}),
    ],
)
def test_training_on_known_data_reaches_its_entropy_in_every_bound_and_never_passes_it(granularity: int, terms: dict):
    often = torch.tensor([0.4, 0.1, 0.1, 0.4], dtype=torch.float64)  # their two bits are equal with probability 0.8
    joint = often.unsqueeze(-1) * (0.8 * torch.eye(4, dtype=torch.float64) + 0.2 * often)  # the second is often a copy
    codec, entropy, size, steps = build_codec(4, granularity), exact.entropy(joint), 128, 200
    model, aim = TinyModel(codec, 2, layers=1), MaskedObjective(terms=terms)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    sequences, weight = exact.all_sequences(4, 2), joint.flatten()
    for _ in range(steps):
        tokens = sequences[torch.multinomial(weight, size, replacement=True, generator=generator)]
        times = masking.stratified_times(
            torch.rand((), generator=generator), torch.rand(size, generator=generator), torch.arange(size)
        )
        grouped = masking.random_granularity(torch.rand(size, generator=generator), p_group=0.5)
        noise = torch.rand(size, 2, granularity, generator=generator)
        mask = masking.random_mask(noise, times, grouped=grouped)
        batch = MaskedBatch(tokens=tokens, mask=mask, times=times, grouped=grouped)
        loss = model(batch.inputs(codec), objective.masked_readout(aim, batch, codec)).loss_sum / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    def predict(digits: Tensor) -> Tensor:
        with torch.no_grad():
            return model.logits(digits).double()

    subtoken, token, joint_loss = (
        float((weight * bound(predict, codec, sequences)).sum())
        for bound in (exact.nelbo_subtoken, exact.nelbo_token, exact.joint_loss)
    )
    assert entropy <= subtoken <= entropy + 0.04
    assert entropy <= token <= entropy + 0.04
    if granularity == 1:
        assert joint_loss == pytest.approx(subtoken)
    elif "ce_joint" in terms:
        assert joint_loss < entropy - 0.1  # the trap: this number looks better than the data allow

    chain = likelihood.nll_chain(exact.as_backbone(predict, 4), sequences, codec).values[:, 0]
    assert float(torch.exp(-chain).sum()) == pytest.approx(1.0)
    assert entropy <= float((weight * chain).sum()) <= entropy + 0.04
