"""Seeded sampling in plain PyTorch, equal on every device: float32 operations round once, and sums are integers."""

import torch

_WORD = 0xFFFFFFFF


def philox4x32(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10 (Salmon et al., 2011) for 4 counter words and 2 key words.

    Each 32-bit word is in an int64 tensor. A 32 x 32-bit product wraps around in int64, but its bits are right, so
    masks give its halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def scale_uniform(high: torch.Tensor, low: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Scale a 64-bit uniform, given as 32-bit halves, to [0, total).

    The result is ``floor((high * 2^32 + low) * total / 2^64)``.
    """
    total_high, total_low = total >> 32, total & _WORD
    ll, hl, lh = low * total_low, high * total_low, low * total_high
    carry = ((ll >> 32) & _WORD) + (hl & _WORD) + (lh & _WORD)
    return high * total_high + ((hl >> 32) & _WORD) + ((lh >> 32) & _WORD) + (carry >> 32)


def exp_nonpositive(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) for float32 x <= 0.

    It repeats csrc/cpu/vec.h operation by operation, since torch.exp differs between devices.
    """
    clamped = x.clamp(min=-87.0)
    n = (clamped * 1.44269504088896341 - 0.5).trunc()
    r = (clamped - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    scale = ((n.int() + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, p * scale)


def masses(
    x: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, ranked: bool
) -> torch.Tensor:
    """Return the integer mass [N, V] of every token: ``trunc(exp(x) * 2^40)``, or 0 where a filter drops the token.

    ``ranked`` says whether any candidate may use top_k or top_p. Only these need the sort.
    """
    weight = exp_nonpositive(x)
    mass = (weight * 2.0**40).long()
    keep = weight >= min_p[:, None]
    if ranked:
        vocabulary = x.shape[1]
        descending, order = x.sort(dim=1, descending=True)
        k = torch.where(top_k > 0, top_k.clamp(max=vocabulary), vocabulary)
        threshold = descending.gather(1, k[:, None] - 1)
        cumulative = (mass.gather(1, order) * (descending >= threshold)).cumsum(1)
        needed = top_p[:, None].double() * cumulative[:, -1:].double()
        last = (cumulative.double() < needed).sum(1, keepdim=True).clamp(max=vocabulary - 1)
        smallest = torch.where(top_p[:, None] < 1, descending.gather(1, last), -torch.inf)
        keep &= x >= torch.maximum(threshold, smallest)
    return mass * keep


def sample(
    logits: torch.Tensor,
    row: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    ranked: bool = True,
) -> tuple[torch.Tensor, ...]:
    """Sample as ``llava_cot_kernels.sample`` does, without tags.

    Returns (token, logprob, entropy, sampling_logprob, status).
    """
    if logits.shape[0] == 0:
        logits = logits.new_zeros(1, logits.shape[1])
    idle = row < 0
    raw = logits.index_select(0, row.clamp(min=0)).float()
    largest, best = raw.max(dim=1)  # max returns NaN if there is one
    bad = ~largest.isfinite() & ~idle
    d = torch.where((idle | bad)[:, None], 0.0, raw - largest[:, None])  # [N, V], <= 0

    weight = d.double().exp()
    partition = weight.sum(1)
    # exp(-1000) is 0 in float64, so that a masked token adds 0 and not 0 * inf.
    entropy = partition.log() - (weight * d.clamp(min=-1000)).sum(1) / partition

    greedy = temperature == 0
    x = d / torch.where(greedy, 1, temperature)[:, None]
    mass = masses(x, top_k, top_p, min_p, ranked)
    cumulative = mass.cumsum(1)
    total = cumulative[:, -1].contiguous()
    zero = torch.zeros_like(seed)
    words = philox4x32([position & _WORD, position >> 32, zero, zero], [seed & _WORD, seed >> 32])
    target = scale_uniform(words[1], words[0], total)
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    token = torch.where(greedy, best, drawn)

    chosen = token[:, None]
    logprob = d.gather(1, chosen).squeeze(1).double() - partition.log()
    sampling_logprob = x.gather(1, chosen).squeeze(1).double() - (total.double() / 2.0**40).log()
    silent = idle | bad
    token = torch.where(silent, -1, token)
    logprob, entropy = (torch.where(silent, 0, value).float() for value in (logprob, entropy))
    sampling_logprob = torch.where(silent | greedy, 0, sampling_logprob).float()
    return token, logprob, entropy, sampling_logprob, bad.int()
