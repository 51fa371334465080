"""Limit which tokens of a packed row an image reaches, with two hooks on unmodified transformers.

In transformers the cross attention lets the tokens before a sample's image see every tile, and only the MLP after it is
masked. A sample without an image skips the cross-attention layers. If samples share a row, the model cannot know
either. ``cross_rows`` tells the layers, with one entry per token.
"""

import torch
from torch import nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def install_cross_rows(model: nn.Module) -> None:
    """Make the cross-attention layers of an Mllama obey ``cross_rows``, a keyword argument of ``model.model(...)``.

    ``cross_rows`` is float [batch, tokens, 2] of zeros and ones, as the ``Collator`` makes it. The outputs of the
    layer's attention and of its MLP are multiplied by them before they are added to the token. A call without
    ``cross_rows`` works as before. The hooks keep no state, so a layer may be wrapped, sharded, or computed twice.
    """
    for layer in model.modules():
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.register_forward_pre_hook(_mask_mlp, with_kwargs=True)
            layer.cross_attn.register_forward_hook(_mask_attention, with_kwargs=True)


def _mask_mlp(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    rows = kwargs.get("cross_rows")
    if rows is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = rows[:, None, :, 1:].to(hidden.dtype)  # [batch, 1, tokens, 1], as in transformers
    return args, {**kwargs, "full_text_row_masked_out_mask": mask}


def _mask_attention(attention: nn.Module, args: tuple, kwargs: dict, output: tuple[torch.Tensor, ...]) -> tuple | None:
    rows = kwargs.get("cross_rows")  # the layer passes its keyword arguments on
    if rows is None:
        return None
    return output[0] * rows[..., :1].to(output[0].dtype), *output[1:]
