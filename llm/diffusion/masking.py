"""Which units are hidden: times, masks and lengths, as pure functions of uniform noise that the caller supplies.

A unit is what is masked at once: a digit, or a whole token. Noise is uniform on [0, 1) and belongs to the sample (its
global index), never to the process that happens to hold it, so that masks do not depend on world size or micro-batch.
"""

import torch
from torch import Tensor

from llm.diffusion.codec import Codec


def stratified_times(offset: Tensor, shuffle: Tensor, positions: Tensor) -> Tensor:
    """float32 [n]: times in [0, 1) of the samples at `positions` [n] of a global batch, one in each stratum 1/B wide.

    t_i = (offset + s_i / B) mod 1 with one uniform `offset` [] for the whole batch and s the ranks of the uniforms
    `shuffle` [B]. The shuffle keeps time independent of a sample's place in the batch.
    """
    stratum = shuffle.argsort().argsort()[positions]
    return ((offset.double() + stratum / len(shuffle)) % 1.0).float().clamp_(max=1.0 - 2.0**-24)


def masked_fraction(times: Tensor, *, epsilon: float) -> Tensor:
    """[B]: (1 - epsilon) t + epsilon, the mask probability, and 1 / weight, of SMDM and of the Prime-v2 1.1B run."""
    return (1.0 - epsilon) * times + epsilon


def random_granularity(noise: Tensor, *, p_group: float) -> Tensor:
    """bool [B]: sequences whose tokens are masked as a whole, a share `p_group`, chosen by noise [B] at any time.

    Independence of the time makes the mean of the two bounds a bound for the mixture.
    """
    return noise < p_group


def granularity_by_time(times: Tensor, *, chunk_point: float) -> Tensor:
    """bool [B]: whole tokens above `chunk_point`, digits below: the published Prime-v2 recipe, without a bound."""
    return times > chunk_point


def random_mask(
    noise: Tensor, times: Tensor, *, grouped: Tensor | None = None, maskable: Tensor | None = None
) -> Tensor:
    """bool [B, L, l]: each unit masked with probability `times` [B], from noise [B, L, l].

    grouped: bool [B], sequences masked by whole tokens (one draw, that of the first digit, serves all). maskable: bool
    [B, L], the region that may be masked; None is everywhere.
    """
    if grouped is not None:
        noise = torch.where(grouped[:, None, None], noise[..., :1], noise)
    mask = noise < times[:, None, None]
    return mask if maskable is None else mask & maskable.unsqueeze(-1)


def layer_at(times: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    """(layer int64 [B], time within it float32 [B]) at `times` [B] when digits are revealed layer by layer.

    The unit interval is cut into l equal windows, from the last digit (times near 0) to the first (near 1), so that
    every first digit is revealed before any second one. Within its window a digit is masked with the window's time.
    """
    place = times * granularity
    window = place.long().clamp(max=granularity - 1)
    return granularity - 1 - window, place - window


def layered(mask: Tensor, layer: Tensor, granularity: int, *, maskable: Tensor | None = None) -> Tensor:
    """bool [B, L, l]: in the state of `layer` int64 [B], the digits before it are visible, those behind it hidden.

    mask: bool [B, L, 1], what is hidden of the layer's own digits. maskable: bool [B, L], outside of it all is visible.
    """
    digit = torch.arange(granularity, device=mask.device)
    behind = (digit > layer[:, None, None]).expand(*mask.shape[:2], granularity)
    if maskable is not None:
        behind = behind & maskable.unsqueeze(-1)
    return behind | (mask & (digit == layer[:, None, None]))


def fixed_count_mask(noise: Tensor, count: Tensor, *, maskable: Tensor | None = None) -> Tensor:
    """bool, shaped like noise [B, ...]: exactly count[b] units of each sequence masked, every subset equally likely.

    The units with the smallest noise are taken. Whole tokens: pass noise [B, L, 1]. maskable: bool [B, L] as above.
    count: int64 [B], at most the number of maskable units (beyond it the mask would leave the region: ValueError).
    """
    keys = noise if maskable is None else noise.masked_fill(~maskable.unsqueeze(-1), torch.inf)
    keys = keys.flatten(1)
    if bool((count > (keys < torch.inf).sum(-1)).any()):
        raise ValueError(f"Cannot mask {int(count.max())} units: a sequence has fewer that may be masked.")
    ranks = keys.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (ranks < count.unsqueeze(-1)).view(noise.shape)


def stratified_count(noise: Tensor, draw: int | Tensor, draws: int, units: Tensor) -> Tensor:
    """int64 [B]: uniform on {1..units[b]} over the `draws` draws of a sequence together, one draw in each stratum.

    draw: which of them, for all rows or int64 [B].
    """
    uniform = (draw + noise.double()) / draws
    return torch.minimum((uniform * units).long() + 1, units)


def random_length(noise: Tensor, length: int, *, probability: float) -> int:
    """`length`, or with `probability` a uniform length in {1..length}; noise [2] must be the same on every process."""
    chosen, place = noise.tolist()
    return min(int(place * length) + 1, length) if chosen < probability else length


def hide(digits: Tensor, mask: Tensor, codec: Codec) -> Tensor:
    """int64 digits [B, L, l] with the mask symbol where `mask` [B, L, l or 1] is set: what the network sees."""
    return torch.where(mask, codec.mask_symbol, digits)
