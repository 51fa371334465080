"""Random tiny models whose images are tokens of the prompt, and random inputs for them: three of each kind of image."""

from functools import partial

from llava_cot.check.random_models import IMAGE_SIZE, PATCH_SIZE, build_model, make_inputs

FAMILIES = {name: (partial(build_model, name), make_inputs) for name in ("llava", "pixtral", "qwen2_5_vl")}
build_random_llava, build_random_qwen2_5_vl = (FAMILIES[name][0] for name in ("llava", "qwen2_5_vl"))
__all__ = ["FAMILIES", "IMAGE_SIZE", "PATCH_SIZE", "build_random_llava", "build_random_qwen2_5_vl"]
