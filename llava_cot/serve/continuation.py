"""Raw continuations: what a search that runs elsewhere asks of this server's engine."""

import time
from collections.abc import Sequence
from typing import Any

from llava_cot.core import Continuation, Expand, Extend, Finish, Program, SamplingParams
from llava_cot.search.plan import Plan
from llava_cot.search.sample import Limits as SearchLimits
from llava_cot.search.search import Search, stop_tags
from llava_cot.search.tree import Node
from llava_cot.serve.chat import new_id, stops_of
from llava_cot.serve.errors import RequestError
from llava_cot.serve.held import Holding
from llava_cot.serve.intake import SAMPLING, Asked, Intake, Work, chat_conversation, within
from llava_cot.serve.metrics import Metrics
from llava_cot.serve.reply import token_logprob
from llava_cot.serve.running import ended
from llava_cot.serve.schema import ChatRequest, Message


class Continuations:
    """Draws continuations of a prompt, or of the beginning of a reply, all from one prefill.

    The tokens are those that the engine draws for the same seeds in this process.
    """

    def __init__(self, intake: Intake, metrics: Metrics) -> None:
        self._intake, self._generator, self._metrics = intake, intake.generator, metrics
        self._tags = stop_tags(self._generator.grammar)

    async def work(self, request: ChatRequest, asked: Asked, holding: Holding) -> Work:
        """Check a request with ``llava_cot.output`` "raw", and return its work: one run, with all of its seeds.

        ``holding`` counts its images.

        Raises:
            RequestError: it is wrong. The error names the field.
        """
        intake, limits, extension = self._intake, self._intake.limits, request.llava_cot
        if request.stream:
            raise RequestError(400, "stream must be false with llava_cot.output='raw', got true", "stream")
        if extension.search is not None or extension.settings or extension.scorer is not None:
            message = "llava_cot must not have a search, settings or a scorer with output='raw'"
            raise RequestError(400, message, "llava_cot")
        intake.presets.search_of(request.model)
        messages, prefix = self._prefix(request)
        conversation = chat_conversation(messages)
        question, urls = intake.conversation(conversation)
        await intake.count(question, conversation.field)
        if extension.seeds is None:
            within("n", request.n, 1, limits.max_n)
            seeds = intake.seeds(request.seed, request.n)
        else:
            seeds = tuple(extension.seeds)
            within("llava_cot.seeds must have", len(seeds), 1, limits.max_generations, "entries")
            if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
                raise RequestError(400, f"llava_cot.seeds must be in [0, 2**63), got {wrong[0]}", "llava_cot.seeds")
        most = asked.max_new_tokens or limits.max_new_tokens
        within(asked.max_name, most, 1, limits.max_new_tokens)
        stops, trims = self._stops(request)
        given = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
        try:
            params = SamplingParams(**given)
        except (ValueError, TypeError) as error:
            raise RequestError(400, str(error), str(error).partition(" ")[0]) from None
        budget = intake.budget(extension.budget, 1)

        def tokenise(text: str) -> tuple[int, ...]:  # in the engine's thread, which owns the tokenizer
            return tuple(self._generator.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        def policy(search: Search) -> Program[list[Node]]:
            parent = search.session.root
            tokens = tokenise(prefix) if isinstance(prefix, str) else prefix
            if tokens:
                ((read,),) = yield [Extend(parent, tokens)]
                parent = read.id
            (drawn,) = yield [Expand(parent, seeds, params, most, stops, trims, budget.limit(finishing=True))]
            return [search.node(search.root, None, 1, at, each, True) for at, each in enumerate(drawn)]

        config = SearchLimits(max_new_tokens=most, budget=budget)
        plan = Plan("continuation", config, policy)
        return Work(request.model, plan, question, await intake.load(urls, holding), (0,), conversation.field)

    async def reply(self, request: ChatRequest, work: Work) -> dict[str, Any]:
        """Return the body of the reply."""
        with self._metrics.request(work.plan.name) as measured:
            (run,) = await ended(self._generator, work)
            measured.count(run.search.usage, "stop")
        drawn = [node.continuation for node in run.result]
        prompt = run.search.session.prompt_tokens
        tokens = sum(len(each.tokens) for each in drawn)
        return {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": work.model,
            "choices": [self._choice(request, index, each) for index, each in enumerate(drawn)],
            "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens},
        }

    def _prefix(self, request: ChatRequest) -> tuple[Sequence[Message], str | tuple[int, ...]]:
        """Return the messages without the one that is continued, and that one's tokens, or its text."""
        given = request.llava_cot.prefix_token_ids
        if not request.continue_final_message:
            if given is not None:
                message = "llava_cot.prefix_token_ids must not be given without continue_final_message"
                raise RequestError(400, message, "llava_cot.prefix_token_ids")
            return request.messages, ()
        if request.add_generation_prompt:
            message = "add_generation_prompt must be false with continue_final_message, got true"
            raise RequestError(400, message, "add_generation_prompt")
        messages, last = request.messages[:-1], request.messages[-1] if request.messages else None
        if last is None or last.role != "assistant" or not isinstance(last.content, str):
            message = "messages must end with a text of the assistant with continue_final_message"
            raise RequestError(400, message, "messages")
        if given is None:
            return messages, last.content
        size = self._generator.engine.view.vocab_size
        wrong = [token for token in given if not 0 <= token < size]
        if wrong:
            message = f"llava_cot.prefix_token_ids must be in [0, {size}), got {wrong[0]}"
            raise RequestError(400, message, "llava_cot.prefix_token_ids")
        within("llava_cot.prefix_token_ids must have", len(given), 0, self._intake.limits.max_new_tokens, "entries")
        return messages, tuple(given)

    def _stops(self, request: ChatRequest) -> tuple[frozenset[int], frozenset[int]]:
        """Return the numbers of the stage tags that end a continuation, and those of the ends of sentences.

        A token that reaches past the end of a sentence is not part of the continuation.
        """
        unknown = [stop for stop in stops_of(request) if stop not in self._tags]
        if unknown:
            message = f"stop must be among {self._tags} with llava_cot.output='raw', got {unknown[0]!r}"
            raise RequestError(400, message, "stop")
        if stops_of(request) and not request.include_stop_str_in_output:
            message = "include_stop_str_in_output must be true with stop and llava_cot.output='raw', got false"
            raise RequestError(400, message, "include_stop_str_in_output")
        numbers, stages = {self._tags.index(stop) for stop in stops_of(request)}, len(self._generator.grammar.stops)
        return frozenset(n for n in numbers if n < stages), frozenset(n for n in numbers if n >= stages)

    def _choice(self, request: ChatRequest, index: int, drawn: Continuation) -> dict[str, Any]:
        token_bytes = self._generator.vocabulary.token_bytes
        has_ended = drawn.finish in (Finish.TAG, Finish.EOS)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": drawn.text},
            "finish_reason": "stop" if has_ended else "length",
            "stop_reason": self._tags[drawn.tag] if drawn.finish is Finish.TAG else None,
            "logprobs": None,
            "llava_cot": {
                "sampling_logprobs": drawn.sampling_logprobs,
                "entropies": drawn.entropies,
                "certainties": drawn.certainties,
            },
        }
        if request.return_token_ids:
            choice["token_ids"] = drawn.tokens
        if request.logprobs:
            pairs = zip(drawn.tokens, drawn.logprobs)
            choice["logprobs"] = {"content": [token_logprob(*pair, token_bytes) for pair in pairs], "refusal": None}
        return choice
