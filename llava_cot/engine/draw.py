"""The end of a step: a token for every growing branch, and whether the branch ends with it."""

import math
from typing import NamedTuple

import torch

from llava_cot.engine.branch import Branch, Finish
from llava_cot.engine.job import Job, Slot
from llava_cot_kernels.page_pool import PagePool
from llava_cot_kernels.sampling import SampleOutput, sample
from llava_cot_kernels.stage_tags import StageTags


class Drawn(NamedTuple):
    """For N slots: what the sampler says, and KL(uniform, softmax(logits)) [N] float32 in nats."""

    sampled: SampleOutput
    certainty: torch.Tensor


@torch.inference_mode()
def draw(logits: torch.Tensor, rows: list[int], slots: list[Slot], tags: StageTags) -> Drawn:
    """Draw one token for each slot from its row of ``logits`` [R, V], all in one call."""

    def column(values, dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype, device=logits.device)

    params = [slot.request.params for slot in slots]
    row = column(rows, torch.int64)
    sampled = sample(
        logits,
        row=row,
        temperature=column((p.temperature for p in params), torch.float32),
        top_k=column((p.top_k for p in params), torch.int32),
        top_p=column((p.top_p for p in params), torch.float32),
        min_p=column((p.min_p for p in params), torch.float32),
        seed=column((slot.branch.seed for slot in slots), torch.int64),
        position=column((slot.branch.length for slot in slots), torch.int64),
        tags=tags,
        tag_state=column((slot.branch.tag_state for slot in slots), torch.int32),
    )
    # The drawn token's logit over its log-prob is the normaliser, which the sampler has summed already.
    normaliser = logits[row, sampled.token.clamp(min=0)].float() - sampled.logprob
    mean = logits.mean(-1, dtype=torch.float32)
    return Drawn(sampled, normaliser - mean[row] - math.log(logits.shape[1]))


def grow(slots: list[Slot], drawn: Drawn, eos_token_ids: frozenset[int], tags: StageTags, pool: PagePool) -> None:
    """Note the drawn tokens; the host looks at the device here, once a step."""
    new = drawn.sampled
    columns = (new.token, new.logprob, new.sampling_logprob, new.entropy, drawn.certainty)
    tag_columns = (new.tag_state, new.tag, new.overhang)
    for slot, (token, logprob, sampling_logprob, entropy, certainty, tag_state, tag, overhang) in zip(
        slots, zip(*(column.tolist() for column in (*columns, *tag_columns)))
    ):
        branch, request = slot.branch, slot.request
        branch.tokens.append(token)
        branch.logprobs.append(logprob)
        branch.sampling_logprobs.append(sampling_logprob)
        branch.entropies.append(entropy)
        branch.certainties.append(certainty)
        branch.length += 1
        branch.tag_state = tag_state
        if token in eos_token_ids:
            branch.finish = Finish.EOS
        elif tag >= 0 and (request.stops is None or tag in request.stops):
            branch.finish, branch.tag, branch.overhang = Finish.TAG, tag, overhang
        elif tag in request.trims:
            branch.finish, branch.tag = Finish.TAG, tag
            if overhang and len(branch.tokens) > 1:
                _take_back(branch, tags, pool)
        elif len(branch.tokens) == request.max_new_tokens:
            branch.finish = Finish.LENGTH


def stop(job: Job) -> None:
    """Ask each request once whether its branches are to stop here; what it raises is the job's error."""
    asked: dict[int, bool] = {}
    try:
        for slot in job.slots:
            ask = slot.request.stop
            if ask is None or slot.branch.finish is not None:
                continue
            if id(slot.request) not in asked:
                asked[id(slot.request)] = ask()
            if asked[id(slot.request)]:
                slot.branch.finish = Finish.STOPPED
    except Exception as error:
        job.error = error


def _take_back(branch: Branch, tags: StageTags, pool: PagePool) -> None:
    """Forget the last token, and the tag that it closed, or the next token would close it again."""
    for column in (branch.tokens, branch.logprobs, branch.sampling_logprobs, branch.entropies, branch.certainties):
        column.pop()
    branch.length -= 1
    branch.tag_state = tags.start_state
    pool.truncate(branch.seq, branch.length - 1)
