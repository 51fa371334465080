"""Models that write given tokens, whatever they are asked."""

import copy

import torch


def says(model, tokens):
    """A copy of a model that writes ``tokens`` after each prompt, and then the last of them for ever.

    It knows from a position how many tokens there are before. Prompts end where the first pass over them does.
    """
    model, seen = copy.deepcopy(model), {}

    def note(module, args, kwargs):
        seen["positions"] = kwargs["position_ids"].flatten()

    def write(module, args, logits):
        positions = seen["positions"]
        if int(positions.min()) == 0:  # a prompt, of which only the end is kept
            seen["start"] = int(positions.max()) + 1
            positions = torch.tensor([seen["start"] - 1]).expand(logits.shape[:-1].numel())
        written = torch.full_like(logits, -1e4).flatten(0, -2)
        for row, position in zip(written, positions.tolist()):
            row[tokens[min(max(position + 1 - seen["start"], 0), len(tokens) - 1)]] = 1e4
        return written.view_as(logits)

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model.lm_head.register_forward_hook(write)
    return model
