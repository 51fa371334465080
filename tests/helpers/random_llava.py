"""Random tiny models whose images are tokens of the prompt, and random inputs for them: one of each kind."""

from functools import partial

from llava_cot.check.random_models import IMAGE_SIZE, IMAGE_TOKEN, PATCH_SIZE, build_model, make_inputs

NAMES = ("llava", "pixtral", "qwen2_5_vl", "windowed", "gemma3")
FAMILIES = {name: (partial(build_model, name), make_inputs) for name in NAMES}
build_random_llava, _, build_random_qwen2_5_vl, _, build_random_gemma3 = (build for build, _ in FAMILIES.values())
__all__ = [
    "FAMILIES",
    "IMAGE_SIZE",
    "IMAGE_TOKEN",
    "PATCH_SIZE",
    "build_random_gemma3",
    "build_random_llava",
    "build_random_qwen2_5_vl",
]
