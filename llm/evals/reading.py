"""The network's side of scoring: one batch in, what it says about the tokens asked out.

Guidance and temperature live here. They change which answer a question gets and are no model of the data: what is read
with them ranks options, and is never a likelihood.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm.diffusion import likelihood, masking, regions
from llm.diffusion.codec import Codec
from llm.diffusion.regions import Charge, Questions, RegionName
from llm.evals.models import Scorable
from llm.evals.packing import Batch, Piece, assemble

_CHARGES: dict[RegionName, Charge] = {
    "nelbo_subtoken": "digits",
    "nelbo_layered": "first_digit",
    "loss_ce_joint": "token",
}
_CHUNK = 2**25  # float32 logits of a Hugging Face model that are normalised at a time: 128 MiB


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one model answers. name: the estimate of a masked model; None for the exact one of a causal model."""

    scorable: Scorable
    name: RegionName | None
    guidance: float
    temperature: float

    @torch.no_grad()
    def answers(self, pieces: Sequence[Piece]) -> Tensor:
        """float64 [Q, 1 or 2] on the CPU. A batch that does not fit into the device's memory is read in halves."""
        try:
            return self._answers(assemble(pieces)).cpu()
        except torch.OutOfMemoryError:
            if len(pieces) == 1 and pieces[0][1].stop - pieces[0][1].start == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self.answers(half) for half in _halves(pieces)])

    def _answers(self, batch: Batch) -> Tensor:
        scorable, device = self.scorable, self.scorable.device
        asked = Questions.of(batch.places, batch.targets).to(device)
        tokens = batch.tokens.to(device)
        if scorable.language is None:
            return _ask_huggingface(scorable.model, tokens, batch.real, batch.places, asked, self.temperature)
        if self.name is None or batch.hidden is None:
            return regions.ask_tokens(self._predictor(batch), tokens.unsqueeze(-1), asked, modes=True)
        codec = scorable.language.codec
        inputs = masking.hide(codec.encode(tokens), batch.hidden.to(device), codec)
        if self.name in ("nelbo_token", "nll_chain"):
            return regions.ask_tokens(self._predictor(batch), inputs, asked, modes=False)
        return regions.ask_digits(self._predictor(batch), inputs, asked, codec, _CHARGES[self.name])

    @torch.no_grad()
    def fills_greedily(self, batch: Batch) -> Tensor:
        """bool [B], for masked models: whether filling the hidden tokens, the most confident first, gives the true."""
        assert self.scorable.language is not None and batch.hidden is not None
        device, codec = self.scorable.device, self.scorable.language.codec
        scored = batch.hidden.any(-1).to(device)
        return likelihood.fills_greedily(self._predictor(batch), batch.tokens.to(device), codec, scored=scored).cpu()

    def _predictor(self, batch: Batch) -> likelihood.Predict:
        """The backbone on inputs [B, L, l] with the padding of `batch` hidden from attention.

        Guidance is un + (w + 1) (cond - un) with `un` the network that does not see the context. Logits are linear in
        the last hidden state, so that guiding the latter guides the former, at the price of no second head.
        """
        language, model, device = self.scorable.language, self.scorable.model, self.scorable.device
        assert language is not None
        codec, scale = language.codec, self.guidance + 1.0
        real = None if batch.real is None else batch.real.to(device)
        context = batch.context.to(device).unsqueeze(-1)

        def predict(digits: Tensor, readout: Callable[..., Any]) -> Any:
            def tempered(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                if self.temperature == 1.0:
                    return readout(hidden, weight, bias)
                return readout(hidden / self.temperature, weight, None if bias is None else bias / self.temperature)

            def guided(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                conditional, unconditional = hidden.float().chunk(2)
                return tempered(unconditional + scale * (conditional - unconditional), weight, bias)

            if self.guidance == 0.0:
                return model(language.inputs(digits), tempered, attention_mask=real)
            both = torch.cat([digits, _hide_context(digits, context, codec)])
            twice = None if real is None else torch.cat([real, real])
            return model(language.inputs(both), guided, attention_mask=twice)

        return predict


def _hide_context(digits: Tensor, context: Tensor, codec: Codec) -> Tensor:
    return torch.where(context, codec.mask_symbol, digits)


def _halves(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Of about as many rows each, in order."""
    half = sum(rows.stop - rows.start for _, rows in pieces) // 2
    first: list[Piece] = []
    second: list[Piece] = []
    for job, rows in pieces:
        cut = min(rows.stop, rows.start + half)
        half -= cut - rows.start
        if cut > rows.start:
            first.append((job, slice(rows.start, cut)))
        if cut < rows.stop:
            second.append((job, slice(cut, rows.stop)))
    return first, second


def _ask_huggingface(
    model: Any, tokens: Tensor, real: Tensor | None, places: Tensor, asked: Questions, temperature: float
) -> Tensor:
    """float64 [Q, 2]. Only the logits between the first and the last place that is asked about are computed."""
    length = tokens.shape[1]
    column = places % length
    begin, end = int(column.min()), int(column.max()) + 1
    keep = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep = {"logits_to_keep": torch.arange(begin, end, device=tokens.device)}
    mask = None if real is None else real.long().to(tokens.device)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, **keep).logits  # [B, end - begin or L, V]
    first = begin if keep else 0
    row, column = asked.places // length, asked.places % length - first
    answers = torch.zeros(len(asked.tokens), 2, dtype=torch.float64, device=tokens.device)
    chunk = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(asked.places), chunk):
        part = slice(start, start + chunk)
        which, local = asked.within(part, len(row[part]))
        chosen = logits[row[part], column[part]].float() / temperature  # [p, V]
        answers[which] = regions.token_answers(chosen, local, asked.tokens[which], modes=True).double()
    return asked.in_order_of_asking(answers)
