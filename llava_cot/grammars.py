"""The grammars of published models, by name, and how to tell which one a model writes."""

from typing import TYPE_CHECKING

from llava_cot.chat import render
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_BY_EOS = ("", "")  # a stage that begins where the one before it ends, and ends with the answer

GRAMMARS: dict[str, Grammar] = {
    # LLaVA-CoT (arXiv 2411.10440): <SUMMARY>, <CAPTION>, <REASONING>, <CONCLUSION>
    "llava-cot": LLAVA_COT,
    # R1-Onevision (arXiv 2503.10615), Vision-R1 (2503.06749) and others: <think>...</think><answer>...</answer>
    "think-answer": Grammar.sequence("think", "answer"),
    # models that write <think> themselves and then an answer without tags, such as MiMo-VL (arXiv 2506.03569)
    "think": Grammar.sequence("think", "answer", tags={"answer": _BY_EOS}),
    # models whose chat template has written <think>, such as Qwen3-VL-Thinking (arXiv 2511.21631)
    "prompt-think": Grammar.sequence("think", "answer", tags={"answer": _BY_EOS}, opened="think"),
    # Mulberry (arXiv 2412.18319): headings, each of which ends what stands before it
    "mulberry": Grammar(
        {
            "description": ["rationales"],
            "rationales": ["plan"],
            "plan": ["step"],
            "step": ["step", "answer"],
            "answer": [],
        },
        max_visits={"step": 32},
        tags={
            "description": ("### Image Description:", ""),
            "rationales": ("### Rationales:", ""),
            "plan": ("### Let's think step by step.", ""),
            "step": ("### Step", ""),
            "answer": ("### The final answer is:", ""),
        },
    ),
    # steps that end with a blank line; what stands behind the last one is the answer
    "blank-lines": Grammar(
        {"step": ["step", "answer"], "answer": []},
        start=["step", "answer"],
        max_visits={"step": 64},
        tags={"step": ("", "\n\n"), "answer": _BY_EOS},
    ),
    # an introduction, then lines that begin with "Step", then one that begins with "Answer:"
    "numbered-steps": Grammar(
        {"introduction": ["step"], "step": ["step", "answer"], "answer": []},
        max_visits={"step": 64},
        tags={"introduction": _BY_EOS, "step": ("\nStep ", ""), "answer": ("\nAnswer:", "")},
    ),
    # LlamaV-o1 (arXiv 2501.06186): replies in one chat, each of which a turn of the user asks for, in the words of the
    # authors' evaluation code
    "llamav-o1": Grammar.sequence(
        "summary",
        "caption",
        "reasoning",
        "conclusion",
        turns={
            "summary": "Summarize how you will approach the problem and explain the steps you will take to reach the "
            "answer.",
            "caption": "Provide a detailed description of the image, particularly emphasizing the aspects related to "
            "the question.",
            "reasoning": "Provide a chain-of-thought, logical explanation of the problem. This should outline "
            "step-by-step reasoning.",
            "conclusion": "State the final answer in a clear and direct format. It must match the correct answer "
            "exactly.",
        },
    ),
}

# What is used where nobody knows: the whole answer is one stage.
WHOLE = Grammar.sequence("answer", tags={"answer": _BY_EOS})


def named_grammar(name: str) -> Grammar:
    """Return one of ``GRAMMARS``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GRAMMARS:
        raise ValueError(f"grammar must be one of {list(GRAMMARS)} or a Grammar, got {name!r}")
    return GRAMMARS[name]


def grammar_of(processor: "ProcessorMixin") -> Grammar | None:
    """Return the grammar that a model's chat template or tokenizer shows plainly, or None.

    A template that ends a prompt with ``<think>`` has opened that stage. A tokenizer that has every tag of one grammar
    as a token of its own was made for it.
    """
    if processor.chat_template:
        from jinja2 import TemplateError  # it comes with transformers

        question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        try:
            prompt = render(processor, question, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):
            prompt = ""  # it asks for more than a question
        if prompt.rstrip().endswith("<think>"):
            return GRAMMARS["prompt-think"]
    tokens = processor.tokenizer.get_added_vocab()
    tagged = [grammar for grammar in GRAMMARS.values() if all(map(all, map(grammar.tag_pair, grammar.names)))]
    found = [grammar for grammar in tagged if all(tag in tokens for tag in grammar.all_tags)]
    return found[0] if len(found) == 1 else None
