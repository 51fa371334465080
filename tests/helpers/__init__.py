import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: without a GPU it runs interpreted
    if find_spec("triton"):
        from helpers.interpreter import make_dot_row_independent, patch_the_language_once_a_launch

        make_dot_row_independent()
        patch_the_language_once_a_launch()
