"""A training example: token ids, the tokens to learn, and its images."""

from dataclasses import dataclass

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """A token sequence. ``input_ids``, ``labels`` and ``stages`` have one entry per token."""

    input_ids: list[int]
    labels: list[int]  # the token itself if it is learnt, else IGNORE_INDEX; never an image, a pad or a header
    stages: list[int]  # index into the grammar's names; -1 outside of every stage
    images: list[str]  # files, in the order of the image tokens
    value: float | None = None  # of the example: the target of a reward model, or the value of a reference
