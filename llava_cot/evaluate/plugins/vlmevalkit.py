"""A model class for VLMEvalKit, and its launcher, since VLMEvalKit has no plug-in mechanism.

``python -m llava_cot.evaluate.plugins.vlmevalkit --pretrained tiny --search swires --set max_new_tokens=512
--data MMStar --mode infer`` registers the model under the name ``llava-cot-swires`` and hands over to VLMEvalKit's
``run.py`` with all other arguments.
"""

import argparse
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vlmeval
from vlmeval.vlm.base import BaseModel

from llava_cot.generator import SwiresGenerator


class LlavaCot(BaseModel):
    """Answers by search. VLMEvalKit scores everything that a model returns, so that it gets the conclusion alone.

    A text in which no stage was opened is its own conclusion, as in ``llava-cot evaluate``.

    With the environment variable SPLIT_THINK it gets the whole text instead and splits it by ``split_thinking``: the
    stages before the conclusion go to the column "thinking".

    Args:
        pretrained: a model folder, a hub name or "tiny".
        search: a name of ``llava_cot.search.POLICIES`` or a preset such as "swires:published".
        seed: of every question's search.
        load: arguments of ``SwiresGenerator.from_pretrained``, such as dtype; by default the device is a GPU.
        settings: settings of the search.
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str = "Xkev/Llama-3.2V-11B-cot",
        search: str = "swires",
        seed: int = 0,
        load: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else None
        self.generator = SwiresGenerator.from_pretrained(pretrained, **{"device": device, **(load or {})})
        self.search, self.seed, self.settings = search, seed, settings
        self.generator.plan(search, **settings)  # raises if a setting is wrong

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Return False: the prompt is VLMEvalKit's own for each dataset."""
        return False

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer one question: ``message`` is a list of texts and paths of images, in their order."""
        images = [part["value"] for part in message if part["type"] == "image"]
        parts = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
            for part in message
        ]
        question = [{"role": "user", "content": parts}]
        answer = self.generator.answer(images, question, self.search, seed=self.seed, **self.settings)
        conclusion = answer.grammar.conclusion_of(answer.text, answer.stages).text
        return answer.text if os.getenv("SPLIT_THINK") else conclusion

    def split_thinking(self, text: str) -> tuple[str, str]:
        """Return the conclusion of a text, and the stages before it."""
        grammar = self.generator.grammar
        conclusion = grammar.conclusion_of(text, grammar.parse(text)).text
        begins = [at for at, name in grammar.starts(text) if name == grammar.conclusion]
        if begins:
            return conclusion, text[: begins[0]].rstrip()
        return conclusion, "" if conclusion else text


def main() -> None:
    """Register the model in VLMEvalKit and run its ``run.py`` with the arguments that are not of this launcher."""
    parser = argparse.ArgumentParser(allow_abbrev=False, epilog="All other arguments are those of VLMEvalKit's run.py.")
    parser.add_argument("--pretrained", default="Xkev/Llama-3.2V-11B-cot", help="a model folder, a hub name or tiny")
    parser.add_argument("--search", default="swires")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", action="append", default=[], metavar="NAME=VALUE", help="such as dtype=bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the search")
    own, rest = parser.parse_known_args()
    script = str(_run_script())

    from vlmeval.config import supported_VLM

    name = f"llava-cot-{own.search.replace(':', '-')}"
    load, settings = _values(own.load), _values(own.set)
    supported_VLM[name] = partial(LlavaCot, own.pretrained, own.search, own.seed, load, **settings)
    sys.argv[1:] = [*rest, "--model", name]
    runpy.run_path(script, run_name="__main__")


def _run_script() -> Path:
    """VLMEvalKit's run.py: in the package in the wheels that repackage it, and beside the package in its repository."""
    package = Path(vlmeval.__path__[0])
    for path in (package / "run.py", package.parent / "run.py"):
        if path.is_file():
            return path
    raise ValueError(
        f"VLMEvalKit must be installed with its run.py, got none in or beside {str(package)!r}; "
        "install ms-vlmeval, or VLMEvalKit's repository with `pip install -e`"
    )


def _values(given: list[str]) -> dict[str, Any]:
    """Read "name=value", where a value is JSON or else a string."""
    values: dict[str, Any] = {}
    for name, _, value in (each.partition("=") for each in given):
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


if __name__ == "__main__":
    main()
