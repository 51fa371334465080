"""The plug-in against the real lmms-eval: its registry, its base class, its requests, and its replay of our log."""

import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from helpers.counting_benchmark import CountingBenchmark, results_of

from llava_cot.data import shapes
from llava_cot.evaluate.export import write_lmms_eval_log
from llava_cot.evaluate.plugins import lmms_eval_manifest

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SEEDS = (800_003, 800_004)


@pytest.fixture(scope="module")
def model_class():
    pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    # As lmms-eval does when it is imported, but with the entry points of this source and not of what is installed.
    (group, named), *_ = PROJECT["entry-points"].items()
    ours = EntryPoints(EntryPoint(name, value, group) for name, value in named.items())
    MODEL_REGISTRY_V2._select_entry_points = lambda wanted: [*ours.select(group=wanted)]
    MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)
    return get_model("llava_cot")


@pytest.fixture(scope="module")
def model(model_class):
    return model_class.create_from_arg_string(
        "pretrained=tiny,search=best_of_n,seed=3,n=2,max_new_tokens=160",
        {"batch_size": 1, "max_batch_size": None, "device": "cpu"},
    )


def _requests(model):
    from lmms_eval.api.instance import Instance

    docs = [shapes.sample(seed) for seed in SEEDS]
    model.task_dict = {"shapes": {"test": docs}}

    def doc_to_messages(doc):
        content = [{"type": "image", "url": doc.image}, {"type": "text", "text": doc.question}]
        return [{"role": "user", "content": content}]

    limits = {"max_new_tokens": 16, "temperature": 0, "until": ["\n\n"]}
    return [
        Instance(
            "generate_until",
            ("context", doc_to_messages, dict(limits), number, "shapes", "test"),
            0,
            {"task": "shapes", "doc_id": number, "repeats": 1},
        )
        for number in range(len(docs))
    ]


def test_the_registry_finds_it(model_class):
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    assert issubclass(model_class, lmms) and not model_class.is_simple
    assert not model_class.__abstractmethods__
    assert get_model("llava-cot") is model_class
    assert MODEL_REGISTRY_V2.get_manifest("llava_cot") == lmms_eval_manifest()


def test_it_answers_as_the_generator_does(model):
    from lmms_eval.api.instance import unwrap_generation_output

    results = model.generate_until(_requests(model))
    for seed, result in zip(SEEDS, results):
        sample = shapes.sample(seed)
        answer = model.generator.answer(sample.image, sample.question, "best_of_n", seed=3, n=2, max_new_tokens=160)
        text, counts = unwrap_generation_output(result)
        assert text == answer.conclusion != ""
        assert "<" not in text, "the conclusion alone, and not cut after 16 tokens as the task says"
        assert counts.output_tokens == answer.usage.generated_tokens
        assert 0 < counts.reasoning_tokens < counts.output_tokens
        assert counts.input_tokens == answer.usage.prompt_tokens > 0


def test_a_text_without_stages_is_its_own_conclusion(model_class):
    from lmms_eval.api.instance import unwrap_generation_output

    cut = model_class(pretrained="tiny", search="greedy", device="cpu", max_new_tokens=1)
    for result in cut.generate_until(_requests(cut)):
        text, counts = unwrap_generation_output(result)
        assert text == "<SUMMARY" and (counts.output_tokens, counts.reasoning_tokens) == (1, 0)


def test_what_it_can_not_do(model):
    requests = _requests(model)
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        model.loglikelihood(requests)
    with pytest.raises(NotImplementedError, match="one question at a time"):
        model.generate_until_multi_round(requests)


def test_bad_arguments_are_refused_before_weights_are_loaded(model_class):
    with pytest.raises(ValueError, match="search must be one of"):
        model_class(pretrained="no/such-model", search="magic")
    with pytest.raises(ValueError, match=r"model_args must be settings of search='greedy', .* got 'rounds'"):
        model_class(pretrained="no/such-model", search="greedy", rounds=3)


def test_it_replays_our_log(model_class, tmp_path):
    from_log = pytest.importorskip("lmms_eval.models.simple.from_log", exc_type=ImportError)
    benchmark = CountingBenchmark(4)
    write_lmms_eval_log(benchmark, results_of(benchmark), tmp_path / "log.json", task="counting", model="llava_cot")
    replayed = from_log.FromLog(logs=str(tmp_path))

    class Request:
        def __init__(self, doc_id):
            self.args = ("context", {}, None, doc_id, "counting", "test")

    assert replayed.generate_until([Request(at) for at in (2, 0)]) == ["answer 2", "answer 0"]
