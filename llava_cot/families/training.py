"""The interface of a model family to training."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel


class Example(Protocol):
    """The tokens of an example, and the paths of its images in the order of their image tokens."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def images(self) -> list[str]: ...


class Training(Protocol):
    """The training parts of a model family, bound to the config of one of its models."""

    def __init__(self, config: Any) -> None: ...

    @property
    def parts(self) -> dict[str, str]:
        """A regular expression for each part that can be frozen.

        It matches the beginning of the names of the part's parameters. Every parameter belongs to one part: ``vision``,
        ``projector``, ``language`` (the head and the embedding included), or ``cross`` where there are such layers.
        """
        ...

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the model accept the inputs that ``pack`` makes."""
        ...

    def read_image(self, processor: Any, image: Image.Image) -> Any:
        """Preprocess an image into the form that ``pack`` takes."""
        ...

    def pack(
        self, processor: Any, rows: Sequence[Sequence[Example]], images: Mapping[str, Any], tokens: int
    ) -> dict[str, Tensor]:
        """Return the image inputs of a batch of packed rows.

        A row is its examples one after the other, padded to ``tokens`` tokens. The model's outputs must equal those of
        unmodified transformers on each example alone. A batch without images needs a dummy image that no token sees, so
        that all ranks run the same modules.

        Args:
            images: the images that ``read_image`` made, by path.

        Raises:
            ValueError: an example does not have one image token per image.
        """
        ...

    def full_images(self, *, rows: int, row_tokens: int, images_per_row: int) -> dict[str, Tensor]:
        """Return image inputs as ``pack`` makes them, with images of the largest size that all tokens see."""
        ...

    def count_images(self, inputs: dict[str, Tensor]) -> int:
        """Return the number of images of a batch, without padding and dummies."""
        ...

    def flops(
        self,
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

        As usual, some things are not counted: norms, softmax, rotary and gates, recomputation under activation
        checkpoints, padding, and the half that a causal mask saves (Chowdhery et al., 2022, appendix B).

        Args:
            num_tokens: the number of text tokens without padding.
            num_images: the number of images, each of the largest size.
            num_supervised: the number of tokens that the head runs on; by default all.
            num_pairs: the sum of the squared lengths of the examples. The default assumes one image each and equal
                lengths.
            num_cross_pairs: the pairs of a token and an image key that it sees in a cross-attention layer. By default
                every token sees one image, if there is one.
            freeze: the parts without gradients.
            adapters_only: whether only adapters are trained. Their FLOPs are not counted, and no other weight has a
                gradient.
        """
        ...
