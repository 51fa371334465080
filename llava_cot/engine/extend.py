"""Tokens that a search gives the model to read: their log-probs, and what may come next."""

from collections.abc import Mapping, Sequence

import torch

from llava_cot.engine.branch import Branch
from llava_cot.engine.session import Extension
from llava_cot_kernels.logprob import token_logprobs


@torch.inference_mode()
def read_extensions(
    extensions: Sequence[Extension], logits: torch.Tensor | None, sources: Mapping[Branch | None, int]
) -> None:
    """Note on each branch what the pass has computed: ``logits`` [T, V] after each token.

    ``sources`` says which row belongs to the last token of a branch.
    """
    if not extensions:
        return
    unknown, rows, targets = list[Extension](), list[torch.Tensor](), list[int]()
    for extension in extensions:
        branch, first = extension.branch, extension.first_logits
        if len(branch.tokens) == 1 and branch.tokens[0] in extension.top:
            branch.logprobs = [extension.top[branch.tokens[0]]]
        elif branch.tokens:
            assert logits is not None
            last = sources[branch]
            if first is not None:
                rows.append(first.unsqueeze(0))
            rows.append(logits[last + 1 - len(extension.unread) : last])
            targets += branch.tokens
            unknown.append(extension)
    if unknown:
        read = torch.cat(rows)
        found = iter(token_logprobs(read, torch.tensor(targets, device=read.device)).tolist())
        for extension in unknown:
            extension.branch.logprobs = [next(found) for _ in extension.branch.tokens]
    computed = [extension for extension in extensions if extension.unread]
    if computed:
        assert logits is not None
        kept = logits[[sources[extension.branch] for extension in computed]]  # a copy: the next pass overwrites logits
        for extension, row in zip(computed, kept):
            extension.branch.next_logits = row
    for extension in extensions:
        if not extension.unread:
            extension.branch.next_logits = extension.first_logits
    _look_ahead([extension for extension in extensions if extension.request.top or extension.request.want])


def _look_ahead(asked: Sequence[Extension]) -> None:
    """The most likely next tokens, and the log-probs of those that are wanted."""
    if not asked:
        return
    logits = torch.stack([extension.branch.next_logits for extension in asked])  # type: ignore[misc]
    logprobs = torch.log_softmax(logits.float(), -1)
    best = logprobs.topk(min(max(extension.request.top for extension in asked), logprobs.shape[1]))
    for extension, row, tokens, values in zip(asked, logprobs, best.indices.tolist(), best.values.tolist()):
        branch, request = extension.branch, extension.request
        branch.top = dict(zip(tokens[: request.top], values[: request.top]))
        if request.want:
            branch.wanted = tuple(row[list(request.want)].tolist())
