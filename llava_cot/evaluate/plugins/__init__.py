"""Plug-ins for the harnesses that people already use. Neither harness is needed to import this package."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def lmms_eval_manifest() -> "ModelManifest":
    """The model "llava_cot" as lmms-eval's entry-point group ``lmms_eval.models`` asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "llava_cot", chat_class_path="llava_cot.evaluate.plugins.lmms_eval.LlavaCot", aliases=("llava-cot",)
    )
