"""One training example: token ids, what is to be learnt of them, and its images."""

from dataclasses import dataclass

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """A token sequence. All lists have one entry a token."""

    input_ids: list[int]
    labels: list[int]  # the token itself where it is to be learnt, else IGNORE_INDEX; never an image, a pad, a header
    stages: list[int]  # index into the grammar's names; -1 outside of every stage
    images: list[str]  # files, in the order of the image tokens
    value: float | None = None  # of the whole: what a reward model is to say, or what a reference said
