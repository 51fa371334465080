"""How do question-answer pairs become rows that reason in stages: asked of a model, judged, journalled."""

from llava_cot.data.annotation.run import Outcome, Settings, annotate_file, estimate_file

__all__ = ["Outcome", "Settings", "annotate_file", "estimate_file"]
