"""What a model must give through the engine: what transformers gives from its pixels, however it is computed.

transformers is the reference everywhere, and the model that it runs is the very one that the engine runs. In float32
tokens must be equal. In half precision two orders of the same sums draw different tokens, so log-probs are compared.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from llava_cot.answer import Answer
from llava_cot.core import Extend, Program, SamplingParams
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.threads import threads_for
from llava_cot.generator import SwiresGenerator
from llava_cot.prompt import split_rows
from llava_cot.search import SearchLike, SwiresConfig
from llava_cot.search.search import Search
from llava_cot.search.tree import Node
from llava_cot.stages import LLAVA_COT, Grammar

Inputs = dict[str, Tensor]  # a processor's, for one prompt

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}  # of a log-prob, in nats
NEAR_TIE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}  # the gap at which two tokens may swap
PAGE_SIZE = 4


class Mismatch(Exception):
    """Raised if the engine and transformers differ. Its text says where."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check. ``detail`` says what was compared, or what differed."""

    name: str
    passed: bool
    detail: str
    seconds: float


class _Forced(LogitsProcessor):
    def __init__(self, path: Sequence[int], start: int) -> None:
        self._path, self._start = path, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._path[input_ids.shape[1] - self._start]] = 0.0
        return forced


class Kit:
    """A model and what it is asked.

    Args:
        model: a transformers model of a supported family. It stays as it is.
        processor: its processor, or for a model with random weights any whose tokenizer has as many tokens.
        prompts: a processor's inputs for one prompt each. They should differ in length and in their images.
        grammar: the stages that searches follow. A model that writes none of them is cut after a few tokens.
        max_new_tokens: how far answers are compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[Inputs],
        *,
        grammar: Grammar = LLAVA_COT,
        max_new_tokens: int = 18,
    ) -> None:
        self.model, self.processor, self.prompts, self.grammar = model, processor, list(prompts), grammar
        self.max_new_tokens = max_new_tokens
        self.tolerance, self.near_tie = TOLERANCE[model.dtype], NEAR_TIE[model.dtype]
        self._known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._generated: dict[tuple, list[int]] = {}
        self._alone: list[Answer] | None = None
        self._longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def run(self, checks: Sequence[Callable[["Kit"], str]] | None = None) -> list[Result]:
        """Run all checks, or some of ``CHECKS``. A check that raises anything has failed; the others still run."""
        results, threads = [], torch.get_num_threads()
        torch.set_num_threads(threads_for(self.model, self.model.device) or threads)  # transformers' own part too
        for check in CHECKS if checks is None else checks:
            start = time.perf_counter()
            try:
                passed, detail = True, check(self)
            except Exception as error:
                passed, detail = False, str(error) if isinstance(error, Mismatch) else repr(error)
            name = check.__name__.replace("_", " ")
            results.append(Result(name, passed, detail, time.perf_counter() - start))
        torch.set_num_threads(threads)
        return results

    def generator(self, *, num_pages: int | None = None, **settings: Any) -> SwiresGenerator:
        """Return a generator with an engine of its own. Its pages hold every prompt with all its candidates."""
        own = -(-(self._longest + 3 * self.max_new_tokens) // PAGE_SIZE)
        pages = num_pages or (own + 16 * self.max_new_tokens) * len(self.prompts)
        config = EngineConfig(**{"page_size": PAGE_SIZE, "num_pages": pages, **settings})
        return SwiresGenerator(self.model, self.processor, grammar=self.grammar, engine=config)

    @property
    def swires(self) -> SwiresConfig:
        """A SWIRES that goes back twice. No mean log-prob is above its cutoff, and every stage is cut soon."""
        names = self.grammar.names
        limits = {name: 5 + index % 3 for index, name in enumerate(names)}
        most = max(self.max_new_tokens, sum(limits.values()))
        return SwiresConfig(
            candidates=3,
            keep=2,
            cutoff=0.0,
            max_rounds=3,
            grammar=self.grammar,
            max_stage_tokens=limits,
            max_new_tokens=most,
            temperature=1.1,
            top_p=0.9,
        )

    def answers(self, generator: SwiresGenerator, search: SearchLike, indices: Sequence[int], **settings: Any) -> list:
        """Return the answers to prompts that are searched at the same time, and check that nothing is held after."""
        plan = generator.plan(search, **settings)
        rows = [split_rows(self.prompts[index], self.model.config)[0] for index in indices]
        runs = [generator.start(row, plan, seed=index) for row, index in zip(rows, indices)]
        generator.wait(runs)
        answers = [generator.answer_of(run) for run in runs]
        for run in runs:
            run.cancel()
        held = generator.engine.pages_in_use, generator.engine.images_in_use
        if held != (0, 0):
            raise Mismatch(f"{held[0]} pages and {held[1]} images are still held after the search")
        return answers

    def generate(self, index: int, **settings: Any) -> list[int]:
        """Return what transformers' ``generate`` writes after a prompt."""
        key = index, *settings.items()
        if key not in self._generated:
            inputs = self.prompts[index]
            length = inputs["input_ids"].shape[1]
            made = self.model.generate(**inputs, do_sample=False, **settings)
            self._generated[key] = made[0, length:].tolist()
        return self._generated[key]

    @property
    def alone(self) -> list[Answer]:
        """The answers of ``swires`` to each prompt, one at a time and with plenty of pages."""
        if self._alone is None:
            generator = self.generator(steps_per_look=1)
            self._alone = [self.answers(generator, self.swires, [index])[0] for index in range(len(self.prompts))]
        return self._alone

    def logits(self, index: int, path: Sequence[int]) -> Tensor:
        """Return transformers' logits of each token of a path after a prompt, float32 [tokens, V]."""
        known = self._known.get((index, tuple(path)))
        if known is None:
            inputs = self.prompts[index]
            forced = LogitsProcessorList([_Forced(path, inputs["input_ids"].shape[1])])
            settings = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": len(path)}
            out = self.model.generate(**inputs, do_sample=False, num_beams=1, logits_processor=forced, **settings)
            known = torch.cat(out.logits).float()
            self._known[index, tuple(path)] = known
        return known

    def logprobs(self, index: int, path: Sequence[int]) -> list[float]:
        """Return transformers' log-prob of each token of a path after a prompt, in nats."""
        logits = self.logits(index, path)
        return logits.log_softmax(-1)[torch.arange(len(path)), torch.tensor(path)].tolist()

    def compare_nodes(self, index: int, answer: Answer) -> int:
        """Check the log-probs of all nodes of a search against transformers', and return how many tokens they have."""
        nodes = answer.trace.nodes
        parents = {node["parent"] for node in nodes.values()}
        count = 0
        for node in nodes.values():
            if node["id"] in parents or not node["tokens"]:
                continue  # a path covers its ancestors
            path, found = list[int](), list[float]()
            at: Any = node
            while at is not None:
                path, found = [*at["tokens"], *path], [*at["logprobs"], *found]
                at = nodes.get(at["parent"])
            self.compare(f"prompt {index}, node {node['id']}", found, self.logprobs(index, path))
            count += len(path)
        return count

    def compare(self, what: str, found: Sequence[float], expected: Sequence[float]) -> None:
        """Check that log-probs are within the tolerance of one another."""
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            if not abs(one - other) <= self.tolerance:
                raise Mismatch(f"{what}: the log-prob of token {at} is {one:.5f}, in transformers {other:.5f}")

    def same_search(self, index: int, one: Answer, other: Answer, how: str) -> None:
        """Check that two runs of one search drew the same. In half precision, both must be as in transformers."""
        if self.model.dtype == torch.float32:
            tokens = [[node["tokens"] for node in answer.trace.nodes.values()] for answer in (one, other)]
            if tokens[0] != tokens[1]:
                raise Mismatch(f"prompt {index} draws other tokens {how}")
        else:
            for answer in (one, other):
                self.compare_nodes(index, answer)


def greedy(kit: Kit) -> str:
    """Greedy decoding is ``generate``'s, token for token but for near ties."""
    excused, count = 0, 0
    for page_size in (1, PAGE_SIZE, 16):
        generator = kit.generator(page_size=page_size, num_pages=None if page_size > 1 else 4 * kit._longest)
        for index in range(len(kit.prompts)):
            expected = kit.generate(index, max_new_tokens=kit.max_new_tokens, num_beams=1)
            (answer,) = kit.answers(generator, "greedy", [index], max_new_tokens=kit.max_new_tokens)
            count += len(expected)
            if answer.tokens == expected:
                continue
            pairs = enumerate(zip(answer.tokens, expected))
            at = next((at for at, (one, other) in pairs if one != other), len(expected))
            first, second = kit.logits(index, expected[: at + 1])[at].topk(2).values.tolist()
            if first - second > kit.near_tie:
                raise Mismatch(
                    f"prompt {index} differs from generate at token {at}, with a gap of {first - second:.1e}"
                )
            excused += 1
    return f"{count} tokens equal generate's" + (f", but for {excused} near ties" if excused else "")


def images(kit: Kit) -> str:
    """The answer depends on the pixels."""
    seen, generator = 0, kit.generator()
    for index, prompt in enumerate(kit.prompts):
        if "pixel_values" not in prompt:
            continue
        other = Kit(kit.model, kit.processor, [{**prompt, "pixel_values": -prompt["pixel_values"]}])
        (answer,) = kit.answers(generator, "greedy", [index], max_new_tokens=1)
        (changed,) = other.answers(other.generator(), "greedy", [0], max_new_tokens=1)
        first, second = (next(iter(found.trace.nodes.values())) for found in (answer, changed))
        if (first["tokens"], first["logprobs"]) == (second["tokens"], second["logprobs"]):
            raise Mismatch(f"prompt {index} is answered in the same way with other pixels")
        seen += 1
    return f"{seen} prompts see their images" if seen else "no prompt has an image"


def token_beams(kit: Kit) -> str:
    """Beam search is ``generate``'s."""
    generator, equal, better = kit.generator(), 0, 0
    for index in range(len(kit.prompts)):
        settings = {"num_beams": 3, "max_new_tokens": kit.max_new_tokens}
        expected = kit.generate(index, **settings)
        (answer,) = kit.answers(generator, "token_beam", [index], **settings)
        if answer.tokens == expected:
            continue
        ours, theirs = (sum(kit.logprobs(index, path)) / len(path) for path in (answer.tokens, expected))
        if ours < theirs - kit.near_tie:
            raise Mismatch(f"prompt {index}: the best beam has the score {ours:.5f}, in transformers {theirs:.5f}")
        equal, better = equal + (ours <= theirs + kit.near_tie), better + (ours > theirs + kit.near_tie)
    excused = [f"{equal} with an equal score"] * bool(equal) + [f"{better} with a better one than generate's"] * bool(
        better
    )
    return ", ".join([f"{len(kit.prompts)} prompts with 3 beams", *excused])


def forks_and_retraces(kit: Kit) -> str:
    """Every candidate of a search that goes back has the log-probs that its path has in transformers."""
    count = sum(kit.compare_nodes(index, answer) for index, answer in enumerate(kit.alone))
    events = [event["event"] for answer in kit.alone for event in answer.trace.data["events"]]
    return f"{count} log-probs, {events.count('retraced')} retraces"


def given_tokens(kit: Kit) -> str:
    """Tokens that nobody drew, appended in one pass, and what is drawn behind them."""
    generator = kit.generator()
    for index in range(len(kit.prompts)):
        tokens = tuple((index + 3 * at) % 50 + 3 for at in range(7))
        found: list[Any] = []

        def policy(search: Search) -> Program[Node]:
            (node,) = yield from search.expand([search.root], 1, None, params=SamplingParams())
            ((given,),) = yield [Extend(search.root.continuation.id, tokens)]  # noqa: B023, it runs at once
            found.append(given)  # noqa: B023
            return node

        kit.answers(generator, policy, [index], max_new_tokens=3)
        kit.compare(f"prompt {index}, given tokens", found[0].logprobs, kit.logprobs(index, tokens))
    return f"{7 * len(kit.prompts)} log-probs"


def batches(kit: Kit) -> str:
    """Prompts that are searched at the same time draw what each draws alone."""
    together = kit.answers(kit.generator(), kit.swires, range(len(kit.prompts)))
    for index, (answer, alone) in enumerate(zip(together, kit.alone)):
        kit.same_search(index, answer, alone, "beside others")
    return f"{len(together)} unlike prompts at once"


def page_pressure(kit: Kit) -> str:
    """Searches that run short of pages draw what they draw with plenty."""
    few = -(-(kit._longest + kit.swires.max_new_tokens) // PAGE_SIZE) + 26
    scarce = kit.answers(kit.generator(num_pages=few), kit.swires, range(len(kit.prompts)))
    for index, (answer, alone) in enumerate(zip(scarce, kit.alone)):
        kit.same_search(index, answer, alone, f"with {few} pages")
    recomputed = sum(answer.usage.recomputed_tokens for answer in scarce)
    return f"{recomputed} tokens recomputed with {few} pages"


def windows(kit: Kit) -> str:
    """Several steps between two looks of the host draw what single steps draw."""
    for steps in (2, 7):
        generator = kit.generator(steps_per_look=steps)
        for index, alone in enumerate(kit.alone):
            (answer,) = kit.answers(generator, kit.swires, [index])
            kit.same_search(index, answer, alone, f"in windows of {steps} steps")
    return "2 and 7 steps a look"


CHECKS = (greedy, images, token_beams, forks_and_retraces, given_tokens, batches, page_pressure, windows)
