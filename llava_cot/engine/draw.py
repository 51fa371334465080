"""The end of a step: a token for every growing branch, or several, and whether the branch ends with them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from llava_cot.core import Finish
from llava_cot.engine.branch import Branch
from llava_cot.engine.session import Slot
from llava_cot_kernels.sampling import sample
from llava_cot_kernels.stage_tags import StageTags


class Draw(NamedTuple):
    """A token that is to be drawn for ``slot``: after its own tokens and the first ``ahead`` of its draft."""

    slot: Slot
    row: int  # of the logits
    tag_state: int
    ahead: int = 0

    @classmethod
    def along(cls, slot: Slot, row: int, draft: Sequence[int], tags: StageTags) -> "Iterator[Draw]":
        """One behind the tokens of ``slot``, from ``row``, and one behind each token of ``draft``, from later rows."""
        state = slot.branch.tag_state
        assert state is not None  # a branch that grows has one
        yield cls(slot, row, state)
        for ahead, token in enumerate(draft, 1):
            state, _, _ = tags.advance(state, token)
            yield cls(slot, row + ahead, state, ahead)


class Candidates(NamedTuple):
    """What N draws ask of the sampler, on the logits' device; see ``sample`` for what each is."""

    row: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    tag_state: torch.Tensor


class Row(NamedTuple):
    """What was drawn for a branch."""

    token: int
    tag_state: int
    tag: int
    overhang: int
    logprob: float
    sampling_logprob: float
    entropy: float
    certainty: float  # KL(uniform, softmax(logits)), nats


class Drawn(NamedTuple):
    """A ``Row`` for each of N draws, as the device has it."""

    integers: torch.Tensor  # int64 [4, N]: token, tag_state, tag, overhang; of a window [S, 4, N]
    reals: torch.Tensor  # float32 [4, N]: logprob, sampling_logprob, entropy, certainty; of a window [S, 4, N]

    def rows(self) -> list[Row]:
        """The host looks at the device here."""
        return [Row(*row) for row in zip(*self.integers.tolist(), *self.reals.tolist())]

    def runs(self) -> list["Run"]:
        """What the S steps of a window drew for each of N branches."""
        counts = (self.integers[:, 0] >= 0).sum(0).tolist()
        integers, reals = (part.permute(2, 1, 0).tolist() for part in self)
        return [Run(count, *of_integers, *of_reals) for count, of_integers, of_reals in zip(counts, integers, reals)]


class Run(NamedTuple):
    """What the steps of a window drew for a branch: the columns of their rows, and how many of them drew a token.

    The first rows do. They end where the branch has finished, or where there was nothing to draw from.
    """

    drawn: int
    tokens: list[int]
    tag_states: list[int]
    tags: list[int]
    overhangs: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    entropies: list[float]
    certainties: list[float]

    def row(self, step: int) -> Row:
        return Row(
            self.tokens[step],
            self.tag_states[step],
            self.tags[step],
            self.overhangs[step],
            self.logprobs[step],
            self.sampling_logprobs[step],
            self.entropies[step],
            self.certainties[step],
        )


def candidates(draws: Sequence[Draw], device: torch.device) -> Candidates:
    """What the sampler is asked for ``draws``."""

    def column(values: Iterable[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    params = [draw.slot.request.params for draw in draws]
    return Candidates(
        row=column((draw.row for draw in draws), torch.int64),
        temperature=column((p.temperature for p in params), torch.float32),
        top_k=column((p.top_k for p in params), torch.int64),
        top_p=column((p.top_p for p in params), torch.float32),
        min_p=column((p.min_p for p in params), torch.float32),
        seed=column((draw.slot.branch.seed for draw in draws), torch.int64),
        position=column((draw.slot.branch.length + draw.ahead for draw in draws), torch.int64),
        tag_state=column((draw.tag_state for draw in draws), torch.int32),
    )


@torch.inference_mode()
def draw(logits: torch.Tensor, candidates: Candidates, tags: StageTags) -> Drawn:
    """Draw one token for each candidate from its row of ``logits`` [R, V], all in one call."""
    new = sample(logits, **candidates._asdict(), tags=tags)
    # The drawn token's logit over its log-prob is the normaliser, which the sampler has summed already.
    normaliser = logits[candidates.row, new.token.clamp(min=0)].float() - new.logprob
    mean = logits.mean(-1, dtype=torch.float32)
    certainty = normaliser - mean[candidates.row] - math.log(logits.shape[1])
    return Drawn(
        torch.stack([new.token, new.tag_state.long(), new.tag.long(), new.overhang.long()]),
        torch.stack([new.logprob, new.sampling_logprob, new.entropy, certainty]),
    )


def draw_rows(logits: torch.Tensor, draws: Sequence[Draw], tags: StageTags) -> list[Row]:
    """Make ``draws`` from ``logits`` [R, V]; the token is -1 where there is nothing to draw from."""
    asked = candidates(draws, logits.device)
    try:
        return draw(logits, asked, tags).rows()
    except ValueError:  # on the CPU the sampler refuses all rows where one is bad
        is_bad = ~logits.amax(-1).isfinite()
        if not is_bad.any():
            raise
        drawn = draw(logits.masked_fill(is_bad.unsqueeze(1), 0.0), asked, tags).rows()
        return [found._replace(token=-1) if is_bad[ask.row] else found for ask, found in zip(draws, drawn)]


def grow(
    slot: Slot, rows: Sequence[Row], eos_token_ids: frozenset[int], tags: StageTags, draft: Sequence[int] = ()
) -> int:
    """Note the tokens of ``rows`` that were drawn after what the branch really has, and whether it ends with them.

    The first row is drawn after its own tokens, and each other one after one more token of ``draft``. So a row counts
    as long as what was drawn before it is the draft. Returns how many tokens were drawn.

    Raises:
        ValueError: there was nothing to draw from.
    """
    count = 0
    for row, guess in zip_longest(rows, draft):
        _note(slot, row, eos_token_ids, tags)
        count += 1
        if slot.branch.finish is not None or row.token != guess:
            break
    return count


def grow_along(slot: Slot, run: Run, eos_token_ids: frozenset[int], tags: StageTags) -> int:
    """Note the tokens of ``run``, and whether the branch ends with them; only the last can end it.

    Returns how many tokens were drawn.

    Raises:
        ValueError: there was nothing to draw from.
    """
    branch, before = slot.branch, max(0, run.drawn - 1)
    branch.tokens += run.tokens[:before]
    branch.logprobs += run.logprobs[:before]
    branch.sampling_logprobs += run.sampling_logprobs[:before]
    branch.entropies += run.entropies[:before]
    branch.certainties += run.certainties[:before]
    branch.length += before
    for step in range(before, len(run.tokens)):  # the last token, and one that is missing if it has not ended
        if branch.finish is None:
            _note(slot, run.row(step), eos_token_ids, tags)
    return run.drawn


def _note(slot: Slot, row: Row, eos_token_ids: frozenset[int], tags: StageTags) -> None:
    branch, request = slot.branch, slot.request
    if row.token < 0:
        place = f"after {len(branch.tokens)} tokens of a candidate"
        raise ValueError(f"logits must have a finite largest value and no NaN, got others {place}")
    branch.tokens.append(row.token)
    branch.logprobs.append(row.logprob)
    branch.sampling_logprobs.append(row.sampling_logprob)
    branch.entropies.append(row.entropy)
    branch.certainties.append(row.certainty)
    branch.length += 1
    branch.tag_state = row.tag_state
    is_stop = row.tag >= 0 and (request.stops is None or row.tag in request.stops)
    if is_stop:  # an EOS token may spell a tag
        branch.tag, branch.overhang = row.tag, row.overhang
    if row.token in eos_token_ids:
        branch.finish = Finish.EOS
    elif is_stop:
        branch.finish = Finish.TAG
    elif row.tag in request.trims:
        branch.finish, branch.tag = Finish.TAG, row.tag
        if row.overhang and len(branch.tokens) > 1:
            _take_back(branch, tags)
    elif len(branch.tokens) == request.max_new_tokens:
        branch.finish = Finish.LENGTH


def _take_back(branch: Branch, tags: StageTags) -> None:
    """Forget the last token, and the tag that it closed, or the next token would close it again."""
    for column in (branch.tokens, branch.logprobs, branch.sampling_logprobs, branch.entropies, branch.certainties):
        column.pop()
    branch.length -= 1
    branch.tag_state = tags.start_state
