"""Prompt presets: named ways to ask a benchmark's question. The name is stored beside every number.

The wordings are those of VLMEvalKit at e8e78f05 (``vlmeval/dataset/image_mcq.py``, ``image_base.py`` and
``vlmeval/vlm/llama_vision.py``) and of LLaVA-CoT at 081cc3fe (``inference/VLMEvalKit/inference_demo.py``), character
for character, spaces and line ends at the end included. VLMEvalKit's defaults were the same at 9f21ee8a (November
2024), when LLaVA-CoT was measured with it. A prompt is text alone: both codebases put the image before it, but
VLMEvalKit's Llama-3.2 wrapper puts it after its own prompts for AI2D and MathVista.
"""

from collections.abc import Callable, Mapping

from llava_cot.evaluate.question import Question


def _plain(benchmark: str, question: Question) -> str:
    """The hint, the question and the options, one a line, without any instruction."""
    hint = [question.hint] if question.hint is not None else []
    return "\n".join([*hint, question.text, *_options(question)])


def _vlmevalkit(benchmark: str, question: Question) -> str:
    """What VLMEvalKit asks a model that has no prompts of its own: only multiple choice has an instruction.

    MathVista's file brings its own, together with the options.
    """
    if question.kind != "choice" or "query" in question.fields:
        return str(question.fields.get("query", question.text))
    hint = f"Hint: {question.hint}\n" if question.hint is not None else ""
    options = "".join(f"{option}\n" for option in _options(question))
    options = f"Options:\n{options}" if options else ""
    return f"{hint}Question: {question.text}\n{options}Please select the correct answer from the options above. \n"


def _vlmevalkit_11b(benchmark: str, question: Question) -> str:
    """What VLMEvalKit asks Llama-3.2-11B-Vision, and every model with "11B" in its path."""
    if benchmark in AI2D:
        return (
            f"Look at the scientific diagram carefully and answer the following question: {_listed(question)}\n"
            "Think step by step and finally respond to the question with only the correct option number as "
            '"FINAL ANSWER".<cot_start>Let\'s think step by step.'
        )
    return _vlmevalkit(benchmark, question)


def _authors(benchmark: str, question: Question) -> str:
    """What LLaVA-CoT's authors asked. Their fork has its own prompt for AI2D, and asks MathVista's question alone."""
    if benchmark not in MEASURED:
        raise ValueError(f"preset 'authors' must be used with one of {list(MEASURED)}, got {benchmark!r}")
    if benchmark in AI2D:
        return (
            f"Look at the scientific diagram carefully and answer the following question: {_listed(question)}\n"
            "Respond only with the correct option digit."
        )
    return _vlmevalkit(benchmark, question)


AI2D = ("ai2d", "ai2d_unmasked")
MEASURED = ("mmstar", "mmbench", "mmvet", "mathvista", *AI2D, "hallusionbench")  # by LLaVA-CoT's authors

PRESETS: Mapping[str, Callable[[str, Question], str]] = {
    "plain": _plain,
    "vlmevalkit": _vlmevalkit,
    "vlmevalkit-11b": _vlmevalkit_11b,
    "authors": _authors,
}


def prompt_of(benchmark: str, question: Question, preset: str) -> str:
    """Return the text that a model is asked.

    Args:
        benchmark: the name of the benchmark, since some presets ask differently for each.

    Raises:
        ValueError: there is no such preset, or it does not know this benchmark.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {preset!r}")
    return PRESETS[preset](benchmark, question)


def _options(question: Question) -> list[str]:
    """The options, one a line; none if the text of the question has them."""
    if question.fields.get("options_in_text"):
        return []
    return [f"{letter}. {option}" for letter, option in question.choices.items()]


def _listed(question: Question) -> str:
    return "\n".join([question.text, *_options(question)])
