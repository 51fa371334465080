"""Advance the tag automaton over a batch of tokens, one byte of every token at a time."""

import torch
import torch.nn.functional as F

from llava_cot_kernels.stage_tags import StageTags


def advance(
    tags: StageTags, state: torch.Tensor, token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply ``StageTags.advance`` to state int32 [N] and token int64 [N], where -1 is an empty token.

    Returns state, tag and overhang, each int32 [N].
    """
    known = (token >= 0) & (token < tags.num_tokens)
    token = token.where(known, 0)
    if tags.num_tokens == 0 or tags.token_bytes.numel() == 0:
        return state.clone(), torch.full_like(state, -1), torch.zeros_like(state)
    start = tags.token_offsets[token]
    length = torch.where(known, tags.token_offsets[token + 1] - start, 0)
    # On a GPU the longest token of the vocabulary bounds the loop, so that the host need not wait for the drawn ones.
    longest = tags.max_token_bytes if state.is_cuda else int(length.max()) if len(length) else 0
    place = torch.arange(longest, device=state.device)
    inside = place < length[:, None]  # [N, longest]
    index = (start[:, None] + place).clamp(max=tags.token_bytes.numel() - 1)
    byte = torch.where(inside, tags.token_bytes[index].long(), 256)
    stay = torch.arange(tags.num_states, dtype=torch.int32, device=state.device)
    table = torch.cat([tags.table, stay[:, None]], 1)  # column 256: past the token's end

    walked = [state]
    for i in range(longest):
        walked.append(table[walked[-1].long(), byte[:, i]])
    states = torch.stack(walked, 1)
    closed = F.pad(tags.ends[states[:, 1:].long()].where(inside, -1), (0, 1), value=-1)
    first = (closed >= 0).int().argmax(1, keepdim=True)
    tag = closed.gather(1, first).squeeze(1)
    overhang = torch.where(tag >= 0, length - first.squeeze(1) - 1, 0).int()
    return states[:, -1], tag, overhang
