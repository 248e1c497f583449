"""Peak memory and time of the chunked head, against materialised logits and F.cross_entropy.

Forward and backward of P positions of width D over V classes, gradients for hidden states and weight, one fresh process
for each side: memory is what the process (on CUDA: the allocator) held at most, above what it held before the call. The
third row adds what binary sub-tokens cost: the filter of consistent tokens and a charge for every masked digit.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Cost, Turn, alternate, median, parser, print_table, ratio, timed

from llm.diffusion.codec import build_codec
from llm.diffusion.head import chunked_readout
from llm.diffusion.objective import MaskedBatch, MaskedObjective, masked_readout

SIDES = ("chunked", "chunked, binary digits", "materialised")


def make(side: str, positions: int, width: int, vocab: int, device: torch.device) -> Callable[[], None]:
    """One forward and backward of `side`; every side has the same hidden states and weight."""
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions, width, generator=noise).to(device).requires_grad_()
    weight = (torch.randn(vocab, width, generator=noise) / width**0.5).to(device).requires_grad_()
    tokens = torch.randint(vocab, (1, positions), generator=noise).to(device)
    ones = torch.ones(positions, 1, device=device)
    granularity = (vocab - 1).bit_length()
    codec = build_codec(vocab, granularity, shuffle_seed=0).to(device)
    mask = (torch.rand(1, positions, granularity, generator=noise) < 0.5).to(device)
    mask[..., 0] = True  # every position carries a loss, as on the other sides
    batch = MaskedBatch(tokens=tokens, mask=mask, times=torch.full((1,), 0.5, device=device))

    def loss() -> torch.Tensor:
        if side == "materialised":
            return F.cross_entropy((hidden[0] @ weight.T).float(), tokens[0], reduction="sum")
        if side == "chunked":
            return chunked_readout(hidden[0], weight, None, row_loss, ones)[0]
        return masked_readout(MaskedObjective(terms={"nelbo_subtoken": 1.0}), batch, codec)(
            hidden, weight, None
        ).loss_sum

    def row_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.cross_entropy(logits, tokens[0, rows], reduction="none").unsqueeze(-1)

    def once() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    return once


def serve(pipe: Connection, side: str, positions: int, width: int, vocab: int, device_name: str) -> None:
    """In a process of its own: the peak of the first call, then the cost of one call for every message."""
    device = torch.device(device_name)
    make(side, 8, 16, 64, device)()  # lazy initialisation of torch is not the head's
    once = make(side, positions, width, vocab, device)
    pipe.send(_peak_of(once, device))

    def synchronised() -> None:
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    turn = timed(synchronised)
    while pipe.recv():
        pipe.send(turn())


def _peak_of(function: Callable[[], None], device: torch.device) -> int:
    """Bytes that `function` needs at most, above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))


def measure(positions: int, width: int, vocab: int, device: str, turns: int) -> None:
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, int] = {}
    sides: dict[str, Turn] = {}
    pipes, processes = [], []
    for side in SIDES:
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, side, positions, width, vocab, device), daemon=True)
        process.start()
        theirs.close()
        peaks[side] = mine.recv()
        sides[side] = partial(_ask, mine)
        pipes.append(mine)
        processes.append(process)
    costs = alternate(sides, turns)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    rows = []
    for side in SIDES:
        middle, quotient = median(costs[side]), ratio(costs[side], costs["materialised"])
        rows.append(
            (
                *(side, f"{peaks[side] / 2**20:,.0f}", f"{peaks[side] / peaks['materialised']:.3f}"),
                *(f"{middle.wall:.3f}", f"{middle.cpu:.3f}", f"{quotient.wall:.3f}", f"{quotient.cpu:.3f}"),
            )
        )
    header = ("head", "peak MiB", "memory ratio", "wall s", "CPU s", "time ratio (wall)", "(CPU)")
    shape = f"P = {positions}, D = {width}, V = {vocab}, fp32, {device}"
    print_table(f"{shape} (goals: memory <= 0.25, time <= 1.0; median of {turns} pairs)", header, rows)


def _ask(pipe: Connection) -> Cost:
    pipe.send(True)
    return pipe.recv()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--positions", type=int, default=4096, help="P, positions with a loss")
    arguments.add_argument("--width", type=int, default=512, help="D")
    arguments.add_argument("--vocab", type=int, nargs="+", default=[32000, 50257], help="V")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--turns", type=int, default=3, help="calls of each side")
    chosen = arguments.parse_args()
    for vocab in chosen.vocab:
        if chosen.quick:
            measure(1024, 64, vocab, chosen.device, turns=2)
        else:
            measure(chosen.positions, chosen.width, vocab, chosen.device, turns=chosen.turns)


if __name__ == "__main__":
    main()
