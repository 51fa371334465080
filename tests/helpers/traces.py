"""Traces of scripted searches, as the generator makes them of real ones."""

import itertools
import math

from helpers.scripted import PROMPT_LENGTH, Draft, Play, play
from llava_cot.core import Finish, Usage
from llava_cot.search import SentenceBeamConfig, SwiresConfig
from llava_cot.search.budget import Budget
from llava_cot.search.run import run as run_search
from llava_cot.search.sentence_beam import sentence_beam
from llava_cot.search.swires import swires
from llava_cot.stages import Grammar
from llava_cot.trace import Trace, trace_data

HOSTILE = "</script><script>alert(1)</script><!-- <b><img src=x onerror=alert(2)> <details> & 'a' \"b\" 👩‍🚀🎉"
LONG = "word " * 1999 + "<end>"  # 10,000 characters
LOOP = Grammar(
    {"PLAN": ["LOOK", "SAY"], "LOOK": ["PLAN"], "SAY": []},
    max_visits={"PLAN": 2, "LOOK": 2},
    tags={"PLAN": ("<|plan|>", "<|/plan|>"), "SAY": ("So the answer is", "!")},
)


def run(policy, make_config, script, *, budget: Budget | None = None, grammar: Grammar | None = None) -> Play:
    """``play``, with the log that a search keeps of its own start and end."""

    def running(search, config):
        search.budget = budget
        search.grammar = grammar or search.grammar
        return run_search(search, lambda search: policy(search, config))

    played = play(running, make_config, script)
    played.result = [played.search.nodes[id] for id in played.search.log[-1]["nodes"]]
    return played


def trace_of(played, name="swires", question=f"How many? {HOSTILE}", config=None, error=None) -> Trace:
    search = played.search
    result = played.result or []
    answers = result if isinstance(result, list) else [result]
    nodes = search.nodes[1:]
    usage = Usage(
        prompt_tokens=PROMPT_LENGTH,
        decoded_tokens=7,
        generated_tokens=sum(len(node.tokens) for node in nodes),
        generations=len(nodes),
        image_encodings=1,
        scorer_calls=search.usage.scorer_calls,
        steps=5,
        seconds=nodes[-1].seconds,
    )
    data = trace_data(
        model="",
        versions={},
        question=question,
        search=name,
        config=config or {},
        grammar=search.grammar,
        seed=3,
        bos="one",
        calibration=None,
        prompt_tokens=PROMPT_LENGTH,
        **search.to_dict(),
        answers=[node.id for node in answers],
        usage=usage,
        error=error,
    )
    return Trace(data)


def two_retraces() -> Trace:
    """REASONING fails in round 1 by its second best score, CAPTION in round 2, and round 3 passes with a reasoning that
    round 1 drew."""

    def script(stage, round, parent, index):
        if stage == "REASONING":
            best = {1: 0.7, 3: 0.8}[round]
            score = best if (parent, index) == (0, 0) else -0.4
            text = f"<REASONING> round {round} {HOSTILE} {index} </REASONING>"
            return Draft(score, text=LONG if (round, parent, index) == (1, 1, 1) else text, length=3)
        if stage == "CAPTION":
            ids = f"<CAPTION> caption {index} of round {round} <b>"
            return Draft(0.0 if round == 2 else 0.9 - index / 10, text=ids, length=2)
        return Draft(1.0, text="<CONCLUSION> 4 & 5 </CONCLUSION>" if stage == "CONCLUSION" else None)

    def config(scorer):
        return SwiresConfig.published(
            scorer=scorer, cutoff=0.5, retrace={"CAPTION": "CAPTION", "REASONING": "CAPTION"}, max_rounds=4
        )

    return trace_of(run(swires, config, script))


def loop() -> Trace:
    """Of another grammar: PLAN, LOOK, PLAN, SAY, where the second PLAN fails once and is drawn again; two answers are
    returned. One candidate has left the grammar, and two have no number as their score."""

    def script(stage, round, parent, index):  # ``stage`` is what the default grammar has at this depth
        if stage == "SUMMARY":
            return Draft(0.9 - index / 10, tag=0, text=f"<|plan|>look at {index}<|/plan|>")
        if stage == "CAPTION":
            wrong = round == 1 and index == 2  # a plan where a look belongs
            return Draft(0.8 - index / 10, tag=0 if wrong else 1, text=f"<LOOK> {index} red in round {round} </LOOK>")
        if stage == "REASONING":
            score = math.nan if index == 3 else 0.2 if round == 1 else 0.8
            return Draft(score, tag=0, text=f"<|plan|> say {index} <|/plan|>")
        return Draft(1.0, tag=2, text=f"So the answer is {index}! </b>")

    def config(scorer):
        return SwiresConfig(
            scorer=scorer, cutoff=0.5, grammar=LOOP, retrace={"PLAN": "PLAN", "LOOK": "PLAN"}, num_return_sequences=2
        )

    return trace_of(run(swires, config, script, grammar=LOOP), "swires", "What <is> it?")


def sentences() -> Trace:
    """A sentence beam of six rounds, with one beam that ends early and stays."""

    said = itertools.count()

    def script(stage, round, parent, index):
        number = next(said)
        is_end = number == 5 or number > 20
        text = f"Sentence {number} says what it sees, and goes on about it for some time. "
        return Draft(1 - number / 100, finish=Finish.EOS if is_end else Finish.TAG, text=text, length=9)

    played = run(sentence_beam, lambda scorer: SentenceBeamConfig(scorer=scorer), script)
    return trace_of(played, "sentence_beam", "What is to be seen?")


def spent() -> Trace:
    """A search whose scorer calls are spent at REASONING, so that the best caption is finished greedily."""

    def script(stage, round, parent, index):
        text = f"<{stage}> {index} </{stage}>" if stage else "<REASONING> so </REASONING> <CONCLUSION> 7 </CONCLUSION>"
        return Draft(0.5 - index / 10, finish=Finish.TAG if stage else Finish.EOS, text=text, length=4)

    budget = Budget(scorer_calls=10)
    played = run(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=0.0), script, budget=budget)
    return trace_of(played, config={"budget": budget.limits()})


def failed() -> Trace:
    """A search whose scorer raises at REASONING for every candidate, so that there is no answer."""

    def script(stage, round, parent, index):
        return Draft(0.5 - index / 10, text=f"<{stage}> {index} {HOSTILE} </{stage}>", length=2)

    searches = []

    def config(scorer):
        def failing(spans):
            if spans[0].stage == "REASONING":
                raise RuntimeError(f"out of\nmemory {HOSTILE}")
            return scorer(spans)

        return SwiresConfig(scorer=failing, cutoff=0.0)

    def running(search, config):
        searches.append(search)
        return run_search(search, lambda search: swires(search, config))

    try:
        play(running, config, script)
    except RuntimeError as error:
        return trace_of(Play(searches[0]), error=error)
    raise AssertionError("the search must fail")
