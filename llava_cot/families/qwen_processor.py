"""A processor of Qwen's images and text that needs no torchvision, unlike transformers' own, which takes videos too."""

from typing import Any

from transformers import AutoProcessor, BatchFeature, ProcessorMixin


class QwenImageTextProcessor(ProcessorMixin):
    """Makes what transformers' processors of Qwen2.5-VL and Qwen3-VL make, except that it takes no videos.

    ``AutoProcessor`` finds it by its name in a folder's ``processor_config.json`` once this module is imported.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        # Without the types of its tokens a prompt with images has the positions of plain text.
        return super().__call__(*args, **{"return_mm_token_type_ids": True, **kwargs})

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return self.image_token * (patches // self.image_processor.merge_size**2)


# The key is a config class, of which none is meant here: AutoProcessor also searches the values by name.
AutoProcessor.register(QwenImageTextProcessor, QwenImageTextProcessor)
