"""Random Mllamas of any shape with opened gates, and random inputs for them."""

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

TINY_SHAPE = dict(hidden=32, layers=4, heads=4, kv_heads=2, cross=[1, 3], vocab=97)
ASPECT_RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
TILES_OF_RATIO = [w * h for w, h in ASPECT_RATIOS]


def build_random_mllama(
    *,
    hidden,
    layers,
    heads,
    kv_heads,
    cross,
    vocab,
    seed,
    image=28,
    patch=14,
    vision_hidden=16,
    vision_layers=2,
    ffn=None,
    std=0.3,
):
    """An Mllama with random weights whose image matters: every gate is opened."""
    torch.manual_seed(seed)
    text = MllamaTextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        cross_attention_layers=cross,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=std,
        tie_word_embeddings=False,
    )
    vision = MllamaVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_global_layers=1,
        attention_heads=4,
        image_size=image,
        patch_size=patch,
        max_num_tiles=4,
        supported_aspect_ratios=ASPECT_RATIOS,
        intermediate_layers_indices=[0],
        vision_output_dim=2 * vision_hidden,
        initializer_range=std,
    )
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=vocab)
    )
    open_gates(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()


def open_gates(model):
    """Behind a closed one an image does not matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                parameter.fill_(0.7)


def random_inputs(model, *, length, ratio_id, seed):
    """A processor's inputs for one prompt of ``length`` tokens, where the model is; its image is among the first."""
    generator = torch.Generator().manual_seed(seed)
    vision, vocab = model.config.vision_config, model.config.text_config.vocab_size
    tiles, size = TILES_OF_RATIO[ratio_id - 1], vision.image_size
    ids = torch.randint(3, vocab, (1, length), generator=generator)
    at = min(3, length - 1)
    ids[0, at] = vocab
    cross_mask = torch.zeros(1, length, 1, 4, dtype=torch.int64)
    cross_mask[:, at:, :, :tiles] = 1
    pixels = torch.zeros(1, 1, 4, 3, size, size)
    pixels[:, :, :tiles] = torch.randn(1, 1, tiles, 3, size, size, generator=generator)
    aspect_mask = torch.zeros(1, 1, 4, dtype=torch.int64)
    aspect_mask[..., :tiles] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.to(model.dtype),
        "aspect_ratio_ids": torch.tensor([[ratio_id]]),
        "aspect_ratio_mask": aspect_mask,
        "cross_attention_mask": cross_mask,
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
