"""Which rows of a packed sequence an image reaches: two hooks on unmodified transformers.

In transformers the tokens before a sample's image do not see it alone: the cross attention lets them see every tile,
and only the MLP behind it is masked. A sample without an image skips the cross-attention layers altogether. Where
samples share a row, the model can tell neither; ``cross_rows`` says it to the layers, one entry a token.
"""

import torch
from torch import nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def install_cross_rows(model: nn.Module) -> None:
    """Make the cross-attention layers of an Mllama obey ``cross_rows``, a keyword argument of ``model.model(...)``.

    ``cross_rows`` is float [batch, tokens, 2] of zeros and ones, as the ``Collator`` makes it: what the layer's
    attention and what its MLP add to the token is multiplied by them. A call without it is as before. Nothing is kept
    between the hooks, so a layer may be wrapped, sharded, or computed twice.
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
    mask = rows[:, None, :, 1:].to(hidden.dtype)  # [batch, 1, tokens, 1], as transformers has it
    return args, {**kwargs, "full_text_row_masked_out_mask": mask}


def _mask_attention(attention: nn.Module, args: tuple, kwargs: dict, output: tuple[torch.Tensor, ...]) -> tuple | None:
    rows = kwargs.get("cross_rows")  # the layer hands its keyword arguments on
    if rows is None:
        return None
    return output[0] * rows[..., :1].to(output[0].dtype), *output[1:]
