"""The interface of a model family to training."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

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

    dummy_tokens: ClassVar[int] = 0  # padding that a batch without images needs for its dummy image
    reads_values: ClassVar[bool] = False  # whether a step depends on values, so that tensors without data can't run it

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

    def image_tokens(self, processor: Any, path: str) -> int:
        """Return how many tokens of a prompt stand for the image of this file. Only its size is read.

        Raises:
            ValueError: there is no such image.
        """
        return 1

    def read_image(self, processor: Any, image: Image.Image) -> Any:
        """Preprocess an image into the form that ``pack`` takes."""
        ...

    def pack(
        self,
        processor: Any,
        rows: Sequence[Sequence[Example]],
        images: Mapping[str, Any],
        text: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the inputs of a batch of packed rows: those of the text and those of its images.

        A row is its examples one after the other, and padding. The model's outputs must equal those of unmodified
        transformers on each example alone. A batch without images needs a dummy image that no token of an example sees,
        so that all ranks run the same modules. There is padding for the ``dummy_tokens`` of such an image.

        Args:
            text: ``input_ids`` and ``position_ids``, int64 [rows, tokens]. The positions start over at each example and
                are 0 in the padding.
            images: the images that ``read_image`` made, by path.

        Raises:
            ValueError: an example does not have the image tokens of its images.
        """
        ...

    def full_images(self, text: dict[str, Tensor], *, images_per_row: int) -> dict[str, Tensor]:
        """Return inputs as ``pack`` makes them, with images of the largest size that all tokens see.

        Raises:
            ValueError: a row of ``text`` has no room for so many images.
        """
        ...

    def count_images(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return what ``flops`` takes about the images of a batch, without padding and dummies.

        These are ``num_images`` and, where images have any size, ``grids``.
        """
        ...

    def flops(
        self,
        *,
        num_tokens: int,
        num_images: int,
        grids: Tensor | None = None,
        num_supervised: int | None = None,
        num_pairs: int | None = None,
        freeze: Collection[str] = (),
        adapters_only: bool = False,
    ) -> float:
        """Return the FLOPs of the forward and backward of a batch, counting two for each multiply-add.

        As usual, some things are not counted: norms, softmax, rotary and gates, recomputation under activation
        checkpoints, padding, and the half that a causal mask saves (Chowdhery et al., 2022, appendix B).

        Args:
            num_tokens: the number of text tokens without padding.
            num_images: the number of images, each of the largest size unless ``grids`` are given.
            grids: time, height and width of each image in patches, int64 [num_images, 3].
            num_supervised: the number of tokens that the head runs on; by default all.
            num_pairs: the sum of the squared lengths of the examples. The default assumes one image each and equal
                lengths.
            freeze: the parts without gradients.
            adapters_only: whether only adapters are trained. Their FLOPs are not counted, and no other weight has a
                gradient.
        """
        ...


def times_multiplied(part: str, *, below: bool, freeze: Collection[str], adapters_only: bool) -> int:
    """Return how often a step multiplies the weights of a part. ``below`` says whether earlier parts are trained."""
    return 1 + (below or adapters_only) + (part not in freeze and not adapters_only)
