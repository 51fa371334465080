"""Annotation: a model turns question-answer pairs into rows that reason in stages; they are judged and journalled."""

from llava_cot.data.annotation.run import Outcome, Settings, annotate_file, estimate_file

__all__ = ["Outcome", "Settings", "annotate_file", "estimate_file"]
