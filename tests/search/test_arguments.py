"""A wrong argument ends in one error that names it, what it was and what it must be, before anything is drawn."""

import json
import math

import numpy as np
import pytest

from llava_cot import STAGES, BestOfNConfig, Budget, EngineConfig, MajorityConfig, SwiresConfig, SwiresGenerator
from llava_cot.core import Call, Expand, Extend, Release, SamplingParams
from llava_cot.data import shapes
from llava_cot.scoring import Borda, ByStage, JudgeScorer, Weighted, confidence
from llava_cot.search import POLICIES, SentenceBeamConfig, StageBeamConfig, TokenBeamConfig
from llava_cot.stages import Grammar

SAMPLE = shapes.sample(808_000)
GREEDY = SamplingParams(temperature=0.0)
SCORED = [name for name, (config, _) in POLICIES.items() if hasattr(config, "scorer")]


def ask(generator, search="greedy", **settings):
    return generator.answer(SAMPLE.image, SAMPLE.question, search, **settings)


@pytest.mark.parametrize("search", SCORED)
@pytest.mark.parametrize(
    "scorer, error, message",
    [
        ("confidense", ValueError, r"scorer must be one of \[.*'confidence'.*\] or a callable, got 'confidense'"),
        (None, TypeError, "scorer must be a scorer that can be called, got None"),
        (["confidence"], TypeError, r"scorer must be a scorer that can be called, got \['confidence'\]"),
        (JudgeScorer, TypeError, "scorer must be a scorer, got the class JudgeScorer: give an object of it"),
    ],
)
def test_a_wrong_scorer(tiny, search, scorer, error, message):
    tiny.engine.runner.peak_pages = 0
    with pytest.raises(error, match=message):
        ask(tiny, search, scorer=scorer)
    assert tiny.engine.runner.peak_pages == 0


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda p: ByStage({"CAPTION": "vote"}, confidence),
            TypeError,
            r"scorers\['CAPTION'\] must be a scorer .*'vote'",
        ),
        (lambda p: ByStage({}, None), TypeError, "default must be a scorer that can be called, got None"),
        (lambda p: ByStage([confidence], confidence), TypeError, "scorers must be a mapping from stages to scorers"),
        (lambda p: Borda({"vote": 1.0}), TypeError, "a key of weights must be a scorer that can be called, got 'vote'"),
        (lambda p: Borda([confidence]), TypeError, "weights must be a mapping from scorers to their weights"),
        (lambda p: Weighted({confidence: "1"}), TypeError, r"weights\[confidence\] must be a number, got '1'"),
        (lambda p: Weighted({confidence: math.nan}), ValueError, "weights must be >= 0 and not all 0, got .nan."),
        (lambda p: JudgeScorer(p, "pair"), ValueError, "mode must be 'yes_no' or 'pairwise', got 'pair'"),
        (lambda p: JudgeScorer("yes_no"), TypeError, "processor must be the model's processor, got 'yes_no'"),
        (lambda p: JudgeScorer(p, prompt="{stag}"), ValueError, r"prompt must have no field but .*, got '\{stag\}'"),
        (lambda p: JudgeScorer(p, words="yes"), ValueError, "words must be two verdicts, got 'yes'"),
    ],
)
def test_a_scorer_that_can_not_be_made(tiny, make, error, message):
    with pytest.raises(error, match=message):
        make(tiny.processor)


# (search, its setting, wrong values, how each is answered)
NUMBERS = [
    ("greedy", "max_new_tokens", [None, "8", 1.5, True, [8]], "max_new_tokens must be int, got "),
    ("greedy", "max_new_tokens", [0, -3], "max_new_tokens must be >= 1, got "),
    ("sample", "temperature", ["1", None, True, 1j], "temperature must be float, got "),
    ("sample", "temperature", [-0.1, math.nan], "temperature must be >= 0, got "),
    ("sample", "temperature", [math.inf], "temperature must be finite, got "),
    ("sample", "top_k", [1.0, "5", None, True], "top_k must be int, got "),
    ("sample", "top_p", [0.0, 1.5, math.nan], r"top_p must be in \(0, 1\], got "),
    ("sample", "num_return_sequences", [2.0, "2", None, True], "num_return_sequences must be int, got "),
    ("best_of_n", "n", [2.5, "4", None, True], "n must be int, got "),
    ("majority", "keep_fraction", ["1", None, True], "keep_fraction must be float, got "),
    ("majority", "weight", ["votes", 1, None], "weight must be "),
    ("sentence_beam", "keep", [2.5, "2", None, True], "keep must be int, got "),
    ("sentence_beam", "scope", ["all", 3, None], "scope must be 'stage' or 'path', got "),
    ("stage_beam", "candidates", [2.5, True], r"candidates\['SUMMARY'\] must be int, got "),
    ("stage_beam", "candidates", ["4", None, [4]], "candidates must be int or a mapping from stages to numbers, got "),
    ("stage_beam", "keep", [{"CAPTION": "2"}, {"CAPTION": 1.5}], r"keep\['CAPTION'\] must be int, got "),
    ("stage_beam", "max_stage_tokens", [20, None, "20"], "max_stage_tokens must be a mapping from stages to numbers"),
    ("swires", "max_stage_tokens", [{"CAPTION": None}, {"CAPTION": 2.5}], r"max_stage_tokens\['CAPTION'\] must be int"),
    (
        "swires",
        "retrace",
        ["CAPTION", 3, ["CAPTION"]],
        "retrace must be a mapping from stages to stages, or None, got ",
    ),
    (
        "swires",
        "retrace",
        [{"CAPTION": 3}, {"CAPTION": None}],
        r"retrace\['CAPTION'\] must be that stage or one before",
    ),
    ("swires", "accumulate", ["CAPTION", 3], "accumulate must be a collection of stages or None, got "),
    ("swires", "cutoff", ["0", True, [0.0]], "cutoff must be float or None, got "),
    ("swires", "cutoff", [math.nan], "cutoff must be a number or None, got nan"),
    ("swires", "cutoff_z", [math.nan], "cutoff_z must be a number or None, got nan"),
    ("swires", "cutoff_quantile", [-0.1, 2.0, math.nan], r"cutoff_quantile must be in \[0, 1\], got "),
    ("swires", "final_scope", ["all", None], "final_scope must be "),
    ("swires", "grammar", ["LLAVA_COT", None, Grammar], "grammar must be a Grammar, got "),
    ("token_beam", "num_beams", [2.5, "2", None, True], "num_beams must be int, got "),
    ("token_beam", "length_penalty", ["1", None, True], "length_penalty must be float, got "),
    ("token_beam", "length_penalty", [math.nan, math.inf], "length_penalty must be finite, got "),
    ("token_beam", "length_penalty", [1e308, -51.0, 2**63 - 1], r"length_penalty must be in \[-50, 50\], got "),
    ("token_beam", "early_stopping", [1, 0, None, "always"], "early_stopping must be True, False or 'never', got "),
    *(
        (search, "budget", [{"generated_tokens": 5}, 100, "100", Budget], "budget must be a Budget or None")
        for search in POLICIES
    ),
]


@pytest.mark.parametrize("search, name, values, message", NUMBERS, ids=[f"{s}-{n}-{m[-12:]}" for s, n, _, m in NUMBERS])
def test_a_wrong_setting(tiny, search, name, values, message):
    tiny.engine.runner.peak_pages = 0
    for value in values:
        with pytest.raises((TypeError, ValueError), match=message):
            ask(tiny, search, **{name: value})
    assert tiny.engine.runner.peak_pages == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Budget(generated_tokens="5"), "generated_tokens must be int or None, got '5'"),
        (lambda: Budget(generated_tokens=1.5), "generated_tokens must be int or None, got 1.5"),
        (lambda: Budget(seconds=math.nan), "budget.seconds must be > 0, got nan"),
        (lambda: Budget(seconds=True), "seconds must be float or None, got True"),
        (lambda: Budget(reserve=None), "reserve must be float, got None"),
        (lambda: EngineConfig(page_size=1.5), "page_size must be int, got 1.5"),
        (lambda: EngineConfig(steps_per_look=2.5), "steps_per_look must be int or None, got 2.5"),
        (lambda: EngineConfig(compile=1), "compile must be bool or None, got 1"),
        (lambda: Grammar(["A", "B"]), "follows must be a mapping whose keys are stages, got"),
        (lambda: Grammar({"A": None}), r"follows\['A'\] must be a sequence of stages, got None"),
        (lambda: Grammar({1: []}), "follows must be a mapping whose keys are names of stages, got 1"),
        (lambda: Grammar({"A": []}, start=5), "start must be a sequence of stages, got 5"),
        (lambda: Grammar({"A": []}, max_visits=2), "max_visits must be a mapping whose keys are stages, got 2"),
        (lambda: Grammar({"A": []}, max_visits={"A": 1.5}), r"max_visits\['A'\] must be int, got 1.5"),
        (lambda: Grammar({"A": []}, tags={"A": "<A>"}), r"tags\['A'\] must be an opening and a closing tag, got '<A>'"),
        (lambda: Grammar({"A": []}, tags={"A": ("<A>",)}), r"tags\['A'\] must be an opening and a closing tag, got "),
        (lambda: Grammar({"A": []}, tags={"A": (1, 2)}), r"tags\['A'\] must be an opening and a closing tag, got "),
        (lambda: Expand(0, 3, GREEDY, 5), "seeds must be integers, got 3"),
        (lambda: Expand(0, (True,), GREEDY, 5), "seeds must be integers, got True"),
        (lambda: Expand(0, (1,), 0.6, 5), "params must be SamplingParams, got 0.6"),
        (lambda: Expand([0], (1,), GREEDY, 5), r"parent must be the id of a continuation, got \[0\]"),
        (lambda: Expand(0, (1,), GREEDY, 5, limit=7), "limit must be a Limit or None, got 7"),
        (lambda: Extend(0, 5), "tokens must be integers, got 5"),
        (lambda: Extend(None, (5,)), "parent must be the id of a continuation, got None"),
        (lambda: Extend(0, top=2, want="ab"), "want must be integers, got 'a'"),
        (lambda: Release(1), "ids must be integers, got 1"),
        (lambda: Call(None, [1]), "function must be callable, got None"),
        (lambda: Call(len, 5), "items must be a sequence, got 5"),
    ],
)  # fmt: skip
def test_a_wrong_part(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grammar": 4}, "grammar must be a Grammar, the name of one or None, got 4"),
        ({"system": 4}, "system must be a string or None, got 4"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs must be a mapping, got 'thinking'"),
        ({"engine": {"page_size": 4}}, r"engine must be an EngineConfig, got \{'page_size': 4\}"),
        ({"engine": EngineConfig}, "engine must be an EngineConfig, got <class"),
        ({"calibrations": 5}, "calibrations must be a list of Calibrations, got 5"),
        ({"calibrations": ["confidence"]}, "calibrations must be a list of Calibrations, got 'confidence'"),
    ],
)
def test_a_wrong_generator(tiny, settings, message):
    with pytest.raises(TypeError, match=message):
        SwiresGenerator(tiny.model, tiny.processor, **settings)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g: g.answer_batch(5, ["?"]), "images must be a sequence with one entry for each search, got 5"),
        (lambda g: g.answer_batch("a.png", ["?"]), "images must be a sequence .* got 'a.png'"),
        (lambda g: g.answer_batch([SAMPLE.image], "?"), "questions must be a sequence .* got '?'"),
        (lambda g: g.answer_batch([SAMPLE.image], iter("?")), "questions must be a sequence .* got <str_"),
        (lambda g: ask(g, seed=1.0), "seed must be an integer, got 1.0"),
        (lambda g: ask(g, seed=True), "seed must be an integer, got True"),
        (lambda g: ask(g, seed=math.nan), "seed must be an integer, got nan"),
        (lambda g: ask(g, seed=-1), r"seed must be in \[0, 2\*\*63\), got -1"),
        (lambda g: ask(g, search=["swires"]), r"search must be one of .* got \['swires'\]"),
        (lambda g: ask(g, search=None), "search must be one of .* got None"),
        (lambda g: next(g.stream(SAMPLE.image, "?", "greedy", seed="1")), "seed must be an integer, got '1'"),
        (
            lambda g: g.calibrate([SAMPLE.image], ["?"], data=None),
            "data must be a name of what is measured on, got None",
        ),
        (lambda g: g.calibrate([SAMPLE.image], ["?"], data="x", tempo=1), "tempo is not supported by search='swires'"),
    ],
)
def test_a_wrong_call(tiny, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(tiny)
    assert tiny.engine.pages_in_use == 0


def drawing(then):
    """A policy that draws one answer and does ``then(search, nodes)``."""

    def policy(search):
        nodes = yield from search.expand([search.root], 2, None, params=GREEDY)
        return then(search, nodes)

    return policy


def yielding(value):
    def policy(search):
        yield value

    return policy


def expanding(**changes):
    def policy(search):
        arguments = {"parents": [search.root], "n": 1, "stage": None, "params": GREEDY, **changes}
        return (yield from search.expand(**arguments))

    return policy


def scoring(scorer, scope="stage"):
    def policy(search):
        nodes = yield from search.expand([search.root], 2, None, params=GREEDY)
        yield from search.score(nodes, scorer, scope)
        return search.best(nodes)

    return policy


FUNCTION = "the policy must be a generator function that yields requests, got one that returns "
NODE = "the policy must return a node that it has drawn, or a list of such nodes, got "


@pytest.mark.parametrize(
    "policy, message",
    [
        (lambda search: None, FUNCTION + "None"),
        (lambda search: iter(()), FUNCTION + "<tuple_it"),
        (lambda search: [search.root], FUNCTION + r"\[Node"),
        (drawing(lambda search, nodes: None), NODE + "NoneType"),
        (drawing(lambda search, nodes: "4"), NODE + "str"),
        (drawing(lambda search, nodes: []), NODE + "an empty list"),
        (drawing(lambda search, nodes: search.root), NODE + "the root"),
        (drawing(lambda search, nodes: [nodes[0], 3]), NODE + "int"),
        (drawing(lambda search, nodes: nodes[0].continuation), NODE + "Continuation"),
        (yielding(None), "what a program yields must be a list of requests, got None"),
        (yielding(Release(())), "what a program yields must be a list of requests, got Release"),
        (yielding([None]), "a program must yield requests, got None"),
        (expanding(n=2.5), "n must be int, got 2.5"),
        (expanding(n=0), "n must be >= 1, got 0"),
        (expanding(stage="SUMARY"), r"stage must be one of \[.*\], NEXT or None, got 'SUMARY'"),
        (expanding(params=None), "params must be SamplingParams, got None"),
        (expanding(parents=None), "parents must be a list of nodes, got None"),
        (expanding(parents=[0]), "parents must be a list of nodes, got 0"),
        (expanding(stage=STAGES[0], max_stage_tokens=0), "max_stage_tokens must be >= 1, got 0"),
        (scoring("taste"), "scorer must be one of .* got 'taste'"),
        (scoring(None), "scorer must be a scorer that can be called, got None"),
        (scoring(confidence, "all"), "scope must be 'stage' or 'path', got 'all'"),
        (scoring(lambda spans: None), "scorer must return 1 scores, one per span, got None"),
        (scoring(lambda spans: 0.5), "scorer must return 1 scores, one per span, got 0.5"),
        (scoring(lambda spans: dict.fromkeys(range(len(spans)), 0.5)), "scorer must return a list .* got a dict"),
        (scoring(lambda spans: {span.id for span in spans}), "scorer must return a list .* got a set"),
        (scoring(lambda spans: ["good"]), "scorer must return numbers, got 'good'"),
    ],
)
def test_a_policy_that_does_nonsense(tiny, policy, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        ask(tiny, policy, max_new_tokens=4)
    assert raised.value.trace.data["error"] and tiny.engine.pages_in_use == 0


def test_a_policy_may_name_its_scorer(tiny):
    named, given = (ask(tiny, scoring(scorer), max_new_tokens=4) for scorer in ("confidence", confidence))
    assert named.trace.data["nodes"][0]["score"] == given.trace.data["nodes"][0]["score"]


def test_numbers_of_numpy_are_numbers(tiny):
    """They are in the trace as any others."""
    four = np.int64(4)
    searches = [
        ("sample", {"temperature": np.float32(0.5), "top_k": np.int32(5), "num_return_sequences": np.int8(2)}),
        (BestOfNConfig(n=np.uint8(2)), {"budget": Budget(generated_tokens=np.int64(50), seconds=np.float32(60))}),
        (MajorityConfig(n=four, keep_fraction=np.float32(0.5)), {}),
        (SentenceBeamConfig(candidates=four), {}),
        (StageBeamConfig(candidates=four, keep={stage: np.int16(1) for stage in STAGES}), {}),
        (SwiresConfig(candidates=four, cutoff=np.float32(-0.5), max_stage_tokens={"CAPTION": four}), {}),
        (TokenBeamConfig(num_beams=np.int64(2), length_penalty=np.float32(0.5)), {}),
    ]
    for search, settings in searches:
        answer = ask(tiny, search, seed=np.int64(3), max_new_tokens=np.int32(6), **settings)
        data = json.loads(answer.trace.to_json())
        assert data["seed"] == 3 and data["config"]["max_new_tokens"] == 6
