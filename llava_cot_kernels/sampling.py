"""Seeded sampling of many candidates in one pass, with their scores and the stage tags that they close."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from llava_cot_kernels.backend import OPS, choose
from llava_cot_kernels.checks import FLOATS, Sizes, can_read, check_no_gradient
from llava_cot_kernels.reference import sampling as reference
from llava_cot_kernels.reference import stage_tags as reference_stage_tags
from llava_cot_kernels.stage_tags import StageTags

MAX_VOCABULARY = 2**23  # masses of at most 2^40 each must sum within 63 bits
_INSTEAD = "use detach(), and token_logprobs for a differentiable log-prob of the tokens"


class SampleOutput(NamedTuple):
    """The result of ``sample``: tensors with one entry for each of N candidates."""

    token: torch.Tensor  # int64, -1 for an idle slot or a bad row
    logprob: torch.Tensor  # float32, nats: log softmax(logits)[token], before temperature and filters
    entropy: torch.Tensor  # float32, nats: entropy of softmax(logits)
    sampling_logprob: torch.Tensor  # float32, nats: under the distribution the token was drawn from; 0 if greedy
    tag_state: torch.Tensor  # int32, the automaton's state after the token
    tag: torch.Tensor  # int32, the first tag closed inside the token, or -1
    overhang: torch.Tensor  # int32, the token's bytes after that tag
    status: torch.Tensor  # int32, 1 for a bad row (NaN, +inf or only -inf), else 0


class _Parameter(NamedTuple):
    dtype: torch.dtype
    accepted: tuple[torch.dtype, ...]
    range: str
    is_valid: Callable[[Any], Any]


_INTEGERS = (torch.int64, torch.int32)
_REALS = (*FLOATS, torch.float64)
_INFINITY = 2.0**128 - 2.0**103  # the least number that float32 rounds to infinity
_PARAMETERS = {
    "temperature": _Parameter(
        torch.float32, _REALS, ">= 0 and finite in float32", lambda t: (t >= 0) & (t < _INFINITY)
    ),
    "top_k": _Parameter(torch.int64, _INTEGERS, "in [0, 2**63)", lambda k: (k >= 0) & (k <= 2**63 - 1)),
    "top_p": _Parameter(torch.float32, _REALS, "in (0, 1]", lambda p: (p > 0) & (p <= 1)),
    "min_p": _Parameter(torch.float32, _REALS, "in [0, 1]", lambda p: (p >= 0) & (p <= 1)),
    "seed": _Parameter(torch.int64, _INTEGERS, "in [0, 2**63)", lambda s: (s >= 0) & (s <= 2**63 - 1)),
    "position": _Parameter(torch.int64, _INTEGERS, "in [0, 2**63)", lambda p: (p >= 0) & (p <= 2**63 - 1)),
}


def sample(
    logits: torch.Tensor,
    *,
    row: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    seed: int | torch.Tensor,
    position: int | torch.Tensor,
    tags: StageTags | None = None,
    tag_state: int | torch.Tensor | None = None,
    backend: str = "auto",
) -> SampleOutput:
    """Draw one token for each of N candidates, with its log-probs, the entropy and the stage tag that it closes.

    With ``l = float32(logits[row])`` and ``x = (l - max(l)) / temperature``, per candidate::

        keep  = x >= kth_largest(x, top_k)                                     # top_k
        keep &= x >= max(t : mass(keep, x >= t) >= top_p * mass(keep))         # top_p
        keep &= exp(x) >= min_p                                                # min_p
        mass  = trunc(exp(x) * 2^40) where keep, else 0                        # integers: any order gives the same sum
        u     = Philox4x32-10(key=seed, counter=position), words 1 and 0       # 64 bits
        token = first i with mass[0] + ... + mass[i] > floor(u * sum(mass) / 2^64)

    Every token that is tied with the last one kept is kept too. The largest token is always kept. A token that is less
    likely than the largest by more than a factor of 2^40 is never drawn. The draw depends only on the logits of the
    row, the parameters, the seed and the position. It does not depend on batch, slot, thread count or device.

    Args:
        logits: [R, V] float32, bfloat16 or float16; ``-inf`` masks a token.
        row: int64 [N], the row that each candidate draws from, or -1 for an idle slot. ``None`` means N = R, in order.
        temperature: >= 0. 0 takes the largest logit and ignores the filters; ties go to the lower id.
        top_k: in [0, 2**63), a number of tokens; 0 turns the filter off.
        top_p: in (0, 1].
        min_p: in [0, 1], relative to the most likely token.
        seed: in [0, 2**63).
        position: in [0, 2**63), the position of the token in its candidate. Each draw with one seed needs its own.
        tags: the automaton, on the device of the logits; ``None`` finds no tags.
        tag_state: int32 [N] or a number, the state before the token; ``None`` is ``tags.start_state``. It is not
            modified.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

        Each parameter from ``temperature`` to ``position`` is a number or an [N] tensor. Real ones are rounded to
        float32.

    Returns:
        ``SampleOutput`` of [N] tensors. An idle slot has token -1 and tag -1, keeps its tag_state, and is 0 elsewhere.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value. On CPU also: a row has NaN or
            +inf, or nothing but -inf. On CUDA and inside torch.compile no value is read back. A bad row then gives
            token -1 and status 1. While gradients are recorded also: the logits or a parameter require grad, because no
            output is differentiable.

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    sizes = Sizes()
    sizes.check("logits", logits, "R V", FLOATS)
    check_no_gradient("sample", (("logits", logits),), _INSTEAD)
    if not 1 <= sizes["V"] < MAX_VOCABULARY:
        raise ValueError(f"logits must have 1 <= V < 2**23, got V={sizes['V']}")
    row = _candidate_rows(row, logits, sizes)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given |= {"seed": seed, "position": position}
    parameters = [_per_candidate(name, value, sizes, logits.device) for name, value in given.items()]
    state = _initial_state(tag_state, tags, sizes, logits.device)

    if choose("sample", logits.device.type, backend) == "native":
        output = _native(logits, row, parameters, tags, state)
    else:
        may_rank = isinstance(top_k, torch.Tensor) or isinstance(top_p, torch.Tensor) or top_k > 0 or top_p < 1
        token, logprob, entropy, sampling_logprob, status = reference.sample(logits, row, *parameters, ranked=may_rank)
        if tags is None:
            walked = (state, torch.full_like(state, -1), torch.zeros_like(state))
        else:
            walked = reference_stage_tags.advance(tags, state, token)
        output = SampleOutput(token, logprob, entropy, sampling_logprob, *walked, status)
    if can_read(logits):
        _raise_on_bad_row(output.status, row)
    return output


def _candidate_rows(row: torch.Tensor | None, logits: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    if row is None:
        row = torch.arange(sizes["R"], device=logits.device)
    sizes.check("row", row, "N", torch.int64, logits.device)
    if can_read(row):
        outside = row[(row < -1) | (row >= sizes["R"])]
        if len(outside):
            raise ValueError(f"row must be -1 or in [0, R={sizes['R']}), got {outside[0].item()}")
    return row


def _per_candidate(name: str, value: float | torch.Tensor, sizes: Sizes, device: torch.device) -> torch.Tensor:
    """Check ``value`` and return it as an [N] tensor of the parameter's dtype."""
    dtype, accepted, expected, is_valid = _PARAMETERS[name]
    if isinstance(value, torch.Tensor):
        sizes.check(name, value, "N", accepted, device)
        check_no_gradient("sample", ((name, value),), _INSTEAD)
        if can_read(value):
            bad = value[~is_valid(value)]
            if len(bad):
                raise ValueError(f"{name} must be {expected}, got {bad[0].item()}")
        return value.to(dtype)
    if not isinstance(value, (int, float) if dtype.is_floating_point else int):
        kind = "a number" if dtype.is_floating_point else "an integer"
        raise TypeError(f"{name} must be {kind} or an [N] tensor, got {type(value).__name__}")
    if not is_valid(value):
        raise ValueError(f"{name} must be {expected}, got {value}")
    value = float(value) if dtype.is_floating_point else value  # an integer may have more than 64 bits
    return torch.full((sizes["N"],), value, dtype=dtype, device=device)


def _initial_state(
    tag_state: int | torch.Tensor | None, tags: StageTags | None, sizes: Sizes, device: torch.device
) -> torch.Tensor:
    """Return a new int32 [N] tensor, which the op advances in place."""
    if tags is None:
        if tag_state is not None:
            raise ValueError("tag_state must be None without tags, since a state belongs to an automaton")
        return torch.zeros(sizes["N"], dtype=torch.int32, device=device)
    if not isinstance(tags, StageTags):
        raise TypeError(f"tags must be StageTags or None, got {type(tags).__name__}")
    if tags.table.device != device:
        raise ValueError(f"tags must be on {device}, got {tags.table.device}; use tags.to(device)")
    if tag_state is None:
        tag_state = tags.start_state
    if isinstance(tag_state, int):
        outside = [] if 0 <= tag_state < tags.num_states else [tag_state]
    else:
        sizes.check("tag_state", tag_state, "N", torch.int32, device)
        outside = []
        if can_read(tag_state):
            outside = tag_state[(tag_state < 0) | (tag_state >= tags.num_states)].tolist()
    if outside:
        raise ValueError(f"tag_state must be in [0, num_states={tags.num_states}), got {outside[0]}")
    if isinstance(tag_state, int):
        return torch.full((sizes["N"],), tag_state, dtype=torch.int32, device=device)
    return tag_state.clone()


def _native(
    logits: torch.Tensor,
    row: torch.Tensor,
    parameters: list[torch.Tensor],
    tags: StageTags | None,
    tag_state: torch.Tensor,
) -> SampleOutput:
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    automaton = (None,) * 4 if tags is None else (tags.table, tags.ends, tags.token_bytes, tags.token_offsets)
    token = torch.empty_like(row, memory_format=torch.contiguous_format)
    logprob, entropy, sampling_logprob = (
        torch.empty(len(row), dtype=torch.float32, device=row.device) for _ in range(3)
    )
    tag, overhang, status = (torch.empty(len(row), dtype=torch.int32, device=row.device) for _ in range(3))
    inputs = [tensor.contiguous() for tensor in (row, *parameters)]
    output = SampleOutput(token, logprob, entropy, sampling_logprob, tag_state, tag, overhang, status)
    OPS["native"].sample(logits, *inputs, *automaton, *output)
    return output


def _raise_on_bad_row(status: torch.Tensor, row: torch.Tensor) -> None:
    bad = status.nonzero()
    if len(bad):
        candidate = int(bad[0])
        raise ValueError(
            f"logits row {int(row[candidate])} must have a finite largest value and no NaN, for candidate {candidate}: "
            "it holds NaN or +inf, or only -inf"
        )


@torch.library.register_fake("llava_cot_kernels::sample")
def _(*arguments: Any) -> None:
    return None
