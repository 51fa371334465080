"""Count the FLOPs of a training step of Mllama and of a GPU, for the model FLOPs utilisation (MFU)."""

import re
from collections.abc import Collection

import torch
from transformers import MllamaConfig

# Dense bfloat16 FLOP/s from the vendors' data sheets. The first pattern that matches the name of the device counts.
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
    """Return the FLOPs of the forward and backward of a batch, counting two for each multiply-add.

    Let h be the hidden size, f the FFN size, q and k the widths of all query and of all key heads, T the tokens, S the
    supervised tokens, and I the images of K = max_num_tiles * (patches + 1) keys, one per vision token. The forward
    takes the following, times two:

        self-attention layer    T (2 h q + 2 h k + 3 h f) + 2 q num_pairs
        cross-attention layer   T (2 h q + 3 h f) + I K (2 h k) + 2 q num_cross_pairs
        head                    S h vocab_size
        projector               I K vision_output_dim h
        vision layer            I (N (4 v v + 2 v g) + 2 v N N), v and g its sizes, N = K with each tile padded to 8
        patch embedding         I max_num_tiles patches (channels patch_size^2) v

    The backward takes as much again for the gradients of inputs and as much for those of weights, where there are any.
    The backward of attention takes twice its forward. As usual, some things are not counted: norms, softmax, rotary and
    gates, recomputation under activation checkpoints, padding, and the half that a causal mask saves (Chowdhery et al.,
    2022, appendix B).

    Args:
        num_tokens: the number of text tokens without padding.
        num_images: the number of images. Mllama always computes each with ``max_num_tiles`` tiles.
        num_supervised: the number of tokens that the head runs on; by default all.
        num_pairs: the sum of the squared lengths of the examples. The default assumes one image each and equal lengths.
        num_cross_pairs: the pairs of a token and an image key that it sees. By default every token sees one image, if
            there is one.
        freeze: the parts without gradients: vision, projector, language (with head and embedding) and cross.
        adapters_only: whether only adapters are trained. Their FLOPs are not counted, and no other weight has a
            gradient.
    """
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    keys = vision.max_num_tiles * (patches + 1)
    padded = vision.max_num_tiles * -(-(patches + 1) // 8) * 8
    num_supervised = num_tokens if num_supervised is None else num_supervised
    num_pairs = num_tokens**2 // max(num_images, 1) if num_pairs is None else num_pairs
    num_cross_pairs = (num_tokens * keys if num_images else 0) if num_cross_pairs is None else num_cross_pairs

    def passes(part: str, *, below: bool) -> int:
        """Return how often the weights are multiplied. ``below`` says whether earlier parts are trained."""
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
    """Return the dense bfloat16 FLOP/s of a known NVIDIA GPU, or None for any other device."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)
