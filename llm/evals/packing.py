"""From questions to batches: which inputs the network must see, equal ones once, packed by length.

A job is a set of rows of one length with what is asked of them. Masked models: the options of one question that have
the same context and length share their masks, so the same rows serve several of them (options of one token: one row for
all). Causal models: an input that is the beginning of another is read off the other's row.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm.diffusion.regions import Plan

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Score `continuation` given `context`; both fit into one input. `group`: what shares its noise."""

    context: Tokens
    continuation: Tokens
    group: str

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one question, in nats. `is_mode`: whether each token was the likeliest at its place (causal models)."""

    question: int
    nats: float
    standard_error: float
    rows: int
    is_mode: bool


@dataclass(kw_only=True, eq=False)
class Rows:
    """U inputs of L tokens, and Q tokens asked of them in order of row; `answers` fills up batch by batch."""

    tokens: Tensor  # int64 [U, L]
    hidden: Tensor | None  # bool [U, L, u], what is masked; None for causal models
    context: int  # tokens of it at the front of every row
    row: Tensor  # int64 [Q], increasing
    place: Tensor  # int64 [Q], in the row
    targets: Tensor  # int64 [Q]
    answers: Tensor = field(init=False)  # float64 [Q, 2]: nats, and whether the target is the mode
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.answers = torch.zeros(len(self.row), 2, dtype=torch.float64)
        self.missing = len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def asked_of(self, rows: slice) -> slice:
        """The questions of these rows."""
        first, last = torch.searchsorted(self.row, torch.tensor([rows.start, rows.stop])).tolist()
        return slice(first, last)


class Job(Protocol):
    """Rows, and what their answers mean."""

    rows: Rows

    def finish(self) -> list[Answer]: ...


@dataclass(kw_only=True, eq=False)
class MaskedJob:
    """O options of one length after one context, under the R masks of one plan."""

    rows: Rows
    options: Sequence[int]  # [O], which questions
    plan: Plan
    cell: Tensor  # int64 [Q], into the charges [O, R] of option and mask

    def finish(self) -> list[Answer]:
        charges = torch.zeros(len(self.options) * len(self.plan.masks), dtype=torch.float64)
        charges.index_add_(0, self.cell, self.rows.answers[:, 0])
        draws = self.plan.draws(charges.view(len(self.options), -1))
        nats, errors = draws.values.mean(-1).tolist(), draws.variance().sqrt().tolist()
        return [
            Answer(question=q, nats=x, standard_error=error, rows=len(self.plan.masks), is_mode=False)
            for q, x, error in zip(self.options, nats, errors, strict=True)
        ]


@dataclass(kw_only=True, eq=False)
class CausalJob:
    """Questions whose inputs are beginnings of one row."""

    rows: Rows
    options: Sequence[int]
    option: Tensor  # int64 [Q], in 0..O-1

    def finish(self) -> list[Answer]:
        answers = self.rows.answers
        nats = torch.zeros(len(self.options), dtype=torch.float64).index_add_(0, self.option, answers[:, 0])
        misses = torch.zeros_like(nats).index_add_(0, self.option, 1.0 - answers[:, 1])
        return [
            Answer(question=q, nats=x, standard_error=0.0, rows=1, is_mode=miss == 0)
            for q, x, miss in zip(self.options, nats.tolist(), misses.tolist(), strict=True)
        ]


# --- questions to jobs, longest first --------------------------------------------------------------------------------

_MOST_OPTIONS = 32  # of one job: bounds its memory where thousands of questions have the same (empty) context


def masked_jobs(questions: Sequence[Question], plan_of: Callable[[str, int], Plan]) -> Iterator[MaskedJob]:
    """plan_of: (group, length of the continuation) -> Plan."""

    def bundle(i: int) -> tuple[int, str, Tokens, int]:
        question = questions[i]
        return (-question.length, question.group, question.context, len(question.continuation))

    for (_, group, _, length), members in itertools.groupby(sorted(range(len(questions)), key=bundle), key=bundle):
        options = list(members)
        plan = plan_of(group, length)
        for start in range(0, len(options), _MOST_OPTIONS):
            yield _masked_job(questions, options[start : start + _MOST_OPTIONS], plan)


def _masked_job(questions: Sequence[Question], options: Sequence[int], plan: Plan) -> MaskedJob:
    context = torch.tensor(questions[options[0]].context, dtype=torch.int64)
    regions = torch.tensor([questions[i].continuation for i in options])  # [O, n]
    num_masks, _, per_token = plan.masks.shape
    of_option, of_mask, row_of = _distinct_inputs(regions, plan.masks)
    tokens = torch.cat([context.expand(len(of_option), -1), regions[of_option]], dim=1)
    hidden = torch.zeros(*tokens.shape, per_token, dtype=torch.bool)
    hidden[:, len(context) :] = plan.masks[of_mask]

    mask, place = plan.charged.nonzero(as_tuple=True)  # what each mask charges, for every option
    option = torch.arange(len(options)).repeat_interleave(len(mask))
    mask, place = mask.repeat(len(options)), place.repeat(len(options))
    row = row_of[option, mask]
    order = row.argsort(stable=True)
    option, mask, place = option[order], mask[order], place[order]
    rows = Rows(
        tokens=tokens,
        hidden=hidden,
        context=len(context),
        row=row[order],
        place=place + len(context),
        targets=regions[option, place],
    )
    return MaskedJob(rows=rows, options=options, plan=plan, cell=option * num_masks + mask)


def _distinct_inputs(regions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of U distinct inputs the option and the mask that make them (int64 [U] each), and int64 [O, R]: which is whose.

    Options differ only in what a mask leaves visible, so the more it hides the more of them share the input.
    """
    num_options, num_masks = len(regions), len(masks)
    if num_options == 1:
        every = torch.arange(num_masks)
        return torch.zeros_like(every), every, every.unsqueeze(0)
    visible = torch.where(masks, -1, regions[:, None, :, None]).flatten(2).flatten(0, 1)  # [O * R, n * u]
    as_bytes = np.ascontiguousarray(visible.to(torch.int32).numpy())
    as_one = as_bytes.view(np.dtype((np.void, as_bytes.dtype.itemsize * as_bytes.shape[1]))).ravel()
    _, first, inverse = np.unique(as_one, return_index=True, return_inverse=True)
    chosen = torch.from_numpy(first)
    return chosen // num_masks, chosen % num_masks, torch.from_numpy(inverse).view(num_options, num_masks)


def causal_jobs(questions: Sequence[Question]) -> Iterator[CausalJob]:
    """One row for all inputs that are beginnings of the longest of them."""
    inputs = [(*q.context, *q.continuation)[:-1] for q in questions]
    families: list[list[int]] = []
    for i in sorted(range(len(questions)), key=inputs.__getitem__, reverse=True):
        if families and inputs[families[-1][0]][: len(inputs[i])] == inputs[i]:
            families[-1].append(i)
        else:
            families.append([i])
    for family in sorted(families, key=lambda family: -len(inputs[family[0]])):
        sizes = torch.tensor([len(questions[i].continuation) for i in family])
        ends = torch.tensor([len(inputs[i]) for i in family])
        option = torch.arange(len(family)).repeat_interleave(sizes)
        within = torch.arange(len(option)) - (sizes.cumsum(0) - sizes)[option]
        rows = Rows(
            tokens=torch.tensor([inputs[family[0]]]),
            hidden=None,
            context=len(questions[family[0]].context),
            row=torch.zeros_like(option),
            place=(ends - sizes)[option] + within,
            targets=torch.tensor([token for i in family for token in questions[i].continuation]),
        )
        yield CausalJob(rows=rows, options=family, option=option)


# --- jobs to batches -------------------------------------------------------------------------------------------------

Piece = tuple[Job, slice]
"""Some rows of a job."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B inputs, right-padded to the longest, and Q tokens asked of them."""

    tokens: Tensor  # int64 [B, L]
    real: Tensor | None  # bool [B, L], False where padded; None: nothing is
    hidden: Tensor | None  # bool [B, L, u]
    context: Tensor  # bool [B, L]
    places: Tensor  # int64 [Q], into the flattened [B * L]
    targets: Tensor  # int64 [Q]


def batches(jobs: Iterable[Job], batch_tokens: int) -> Iterator[list[Piece]]:
    """Pieces of at most `batch_tokens` tokens, padding included (one row may have more). Jobs come longest first."""
    batch: list[Piece] = []
    room = 0
    for job in jobs:
        start, count = 0, len(job.rows.tokens)
        while start < count:
            if room == 0:
                if batch:
                    yield batch
                batch, room = [], max(1, batch_tokens // job.rows.length)
            taken = min(room, count - start)
            batch.append((job, slice(start, start + taken)))
            start, room = start + taken, room - taken
    if batch:
        yield batch


def assemble(pieces: Sequence[Piece]) -> Batch:
    """The tensors of one forward pass."""
    length = max(job.rows.length for job, _ in pieces)
    count = sum(rows.stop - rows.start for _, rows in pieces)
    first = pieces[0][0].rows
    tokens = torch.zeros(count, length, dtype=torch.int64)
    hidden = None if first.hidden is None else torch.zeros(count, length, first.hidden.shape[2], dtype=torch.bool)
    lengths, contexts = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    places, targets = [], []
    offset = 0
    for job, rows in pieces:
        part = slice(offset, offset + rows.stop - rows.start)
        tokens[part, : job.rows.length] = job.rows.tokens[rows]
        if hidden is not None and job.rows.hidden is not None:
            hidden[part, : job.rows.length] = job.rows.hidden[rows]
        lengths[part], contexts[part] = job.rows.length, job.rows.context
        asked = job.rows.asked_of(rows)
        places.append((job.rows.row[asked] - rows.start + offset) * length + job.rows.place[asked])
        targets.append(job.rows.targets[asked])
        offset = part.stop
    place = torch.arange(length)
    return Batch(
        tokens=tokens,
        real=None if bool((lengths == length).all()) else place < lengths.unsqueeze(-1),
        hidden=hidden,
        context=place < contexts.unsqueeze(-1),
        places=torch.cat(places),
        targets=torch.cat(targets),
    )


def distribute(pieces: Sequence[Piece], answers: Tensor) -> Iterator[Answer]:
    """Hand the answers [Q, 1 or 2] of a batch to its jobs; yields those of every question that is now complete."""
    start = 0
    for job, rows in pieces:
        asked = job.rows.asked_of(rows)
        stop = start + asked.stop - asked.start
        job.rows.answers[asked, : answers.shape[1]] = answers[start:stop]
        job.rows.missing -= rows.stop - rows.start
        start = stop
        if job.rows.missing == 0:
            yield from job.finish()
