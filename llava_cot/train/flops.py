"""Floating-point operations of a training step of Mllama, and what a GPU could do: model FLOPs utilisation (MFU)."""

import re
from collections.abc import Collection

import torch
from transformers import MllamaConfig

# Dense bfloat16 FLOP/s by the vendors' data sheets; the first pattern found in the device's name counts.
PEAK_FLOPS = {
    r"\b(GB|B)(200|300)\b": 2250e12,
    r"\b(H100|H200|H800) NVL\b": 835e12,
    r"\bH(100|800) PCIe\b": 756e12,
    r"\b(GH200|H100|H200|H800)\b": 989e12,
    r"\bH20\b": 148e12,
    r"\bA(100|800)\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
    r"\bRTX 6000 Ada\b": 364e12,
    r"\bA6000\b": 155e12,
    r"\bA40\b": 150e12,
    r"\bA30\b": 165e12,
    r"\bA10G?\b": 125e12,
    r"\bRTX 4090\b": 165e12,
    r"\bRTX 3090\b": 71e12,
}


def flops_per_batch(
    config: MllamaConfig,
    *,
    num_tokens: int,
    num_images: int,
    num_supervised: int | None = None,
    num_pairs: int | None = None,
    num_cross_pairs: int | None = None,
    freeze: Collection[str] = (),
    adapters_only: bool = False,
) -> float:
    """FLOPs that forward and backward of a batch need, two for each multiply-add.

    With h hidden size, f FFN size, q and k the widths of all query and of all key heads, T tokens, S supervised tokens,
    I images of K = max_num_tiles * (patches + 1) keys (a vision token each), forward takes, halved:

        self-attention layer    T (2 h q + 2 h k + 3 h f) + 2 q num_pairs
        cross-attention layer   T (2 h q + 3 h f) + I K (2 h k) + 2 q num_cross_pairs
        head                    S h vocab_size
        projector               I K vision_output_dim h
        vision layer            I (N (4 v v + 2 v g) + 2 v N N), v and g its sizes, N = K with each tile padded to 8
        patch embedding         I max_num_tiles patches (channels patch_size^2) v

    Backward takes as much for the gradients of inputs, and as much for those of weights, of what has them; attention's
    is twice its forward. Left out, as usual: norms, softmax, rotary and gates, recomputation under activation
    checkpoints, padding, and the half that a causal mask spares (Chowdhery et al., 2022, appendix B).

    Args:
        num_tokens: text tokens without padding.
        num_images: images, each at ``max_num_tiles`` tiles as Mllama computes them whatever their size.
        num_supervised: tokens the head is run for, by default all.
        num_pairs: the sum of the examples' squared lengths, by default as if they had one image each and like lengths.
        num_cross_pairs: pairs of a token and an image key it may see; by default every token sees one image, if any.
        freeze: parts without gradients: vision, projector, language (head and embedding included), cross.
        adapters_only: only adapters are trained: their FLOPs are left out, all other weights have no gradient.
    """
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    keys = vision.max_num_tiles * (patches + 1)
    padded = vision.max_num_tiles * -(-(patches + 1) // 8) * 8
    num_supervised = num_tokens if num_supervised is None else num_supervised
    num_pairs = num_tokens**2 // max(num_images, 1) if num_pairs is None else num_pairs
    num_cross_pairs = (num_tokens * keys if num_images else 0) if num_cross_pairs is None else num_cross_pairs

    def passes(part: str, *, below: bool) -> int:
        """How often its weights are multiplied with; ``below``: what comes before it is trained, so inputs count."""
        return 1 + (below or adapters_only) + (part not in freeze and not adapters_only)

    hidden, head_dim = text.hidden_size, text.hidden_size // text.num_attention_heads
    queries, key_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    ffn = 3 * hidden * text.intermediate_size
    num_cross = len(text.cross_attention_layers)
    num_self = text.num_hidden_layers - num_cross
    has_vision_gradient = "vision" not in freeze or adapters_only
    has_key_gradient = has_vision_gradient or "projector" not in freeze

    total = passes("language", below=True) * num_self * num_tokens * (2 * hidden * (queries + key_width) + ffn)
    total += 3 * num_self * 2 * queries * num_pairs
    total += passes("language", below=True) * num_supervised * hidden * text.vocab_size
    if num_images:
        total += passes("cross", below=True) * num_cross * num_tokens * (2 * hidden * queries + ffn)
        total += passes("cross", below=has_key_gradient) * num_cross * num_images * keys * 2 * hidden * key_width
        total += 3 * num_cross * 2 * queries * num_cross_pairs
    total += passes("projector", below=has_vision_gradient) * num_images * keys * vision.vision_output_dim * hidden
    width, layers = vision.hidden_size, vision.num_hidden_layers + vision.num_global_layers
    weights = (
        passes("vision", below="vision" not in freeze) * padded * width * (4 * width + 2 * vision.intermediate_size)
    )
    attention = (3 if has_vision_gradient else 1) * 2 * width * padded**2
    embedding = (1 + (has_vision_gradient and not adapters_only)) * vision.max_num_tiles * patches
    embedding *= vision.num_channels * vision.patch_size**2 * width
    total += num_images * (layers * (weights + attention) + embedding)
    return 2.0 * total


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bfloat16 FLOP/s of a known NVIDIA GPU, None for anything else."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)
