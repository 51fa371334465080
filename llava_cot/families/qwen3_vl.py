"""Qwen3-VL (Bai et al., 2025, arXiv:2511.21631): Qwen2.5-VL whose vision encoder also feeds early text layers."""

from llava_cot.families.qwen2_5_vl import Qwen2_5_VL


class Qwen3_VL(Qwen2_5_VL):
    model_type = "qwen3_vl"
