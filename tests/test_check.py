"""The conformance kit: every family passes it, and it finds what is wrong."""

import pytest
import torch
from helpers.padding import left_padded
from typer.testing import CliRunner

from llava_cot import cli
from llava_cot.check.kit import (
    CHECKS,
    Kit,
    Mismatch,
    batches,
    forks_and_retraces,
    given_tokens,
    greedy,
    images,
    page_pressure,
    token_beams,
    windows,
)
from llava_cot.check.models import load_kit, random_kit
from llava_cot.check.random_models import CONFIGS, build_model, make_inputs
from llava_cot.check.text import TEXT_CHECKS, check_text, stop_tags, token_text
from llava_cot.engine.model import ModelView
from llava_cot.families import FAMILIES, family_of
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

IN_TURN = (token_beams, batches, page_pressure, windows)  # the engine's part: without --full a family has one of them


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_passes(name, is_full):
    turn = IN_TURN[[*CONFIGS].index(name) % len(IN_TURN)]
    checks = [check for check in CHECKS if is_full or check not in IN_TURN or check is turn]
    results = random_kit(name).run(checks)
    assert [result.name for result in results if not result.passed] == [], results
    assert len(results) == (8 if is_full else 5)


def test_every_family_has_a_random_model():
    assert {model_type for model_type, _ in CONFIGS.values()} | {"mllama"} == FAMILIES.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_is_split_into_its_prompts(name):
    """Images of unlike sizes and numbers, and a prompt without one, as a processor pads them."""
    model = build_model(name)
    rows = [
        make_inputs(model, length=length, images=count, seed=length) for length, count in ((70, 2), (35, 1), (9, 0))
    ]
    together = split_rows(left_padded(family_of(model.config), rows), model.config)
    for prompt, row in zip(together, rows, strict=True):
        (alone,) = split_rows(row, model.config)
        assert prompt.keys() == alone.keys()
        for input_name in alone:
            assert torch.equal(prompt[input_name], alone[input_name]), input_name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    results = random_kit("llava", dtype=dtype).run()
    assert [result.name for result in results if not result.passed] == [], results


def spoil(monkeypatch, change):
    """Let the engine's decoding return other logits."""
    decode = ModelView.decode
    monkeypatch.setattr(ModelView, "decode", lambda self, *args, **kwargs: change(decode(self, *args, **kwargs)))


def test_wrong_logits_are_found(monkeypatch):
    spoil(monkeypatch, lambda logits: logits.flip(-1))
    failed = [result.name for result in random_kit("llava").run([greedy, forks_and_retraces, given_tokens])]
    assert failed == ["greedy", "forks and retraces", "given tokens"]


def test_a_wrong_row_of_a_batch_is_found(monkeypatch):
    spoil(monkeypatch, lambda logits: logits.roll(1, 0) if len(logits) > 6 else logits)
    (result,) = random_kit("llava").run([batches])
    assert not result.passed and "draws other tokens beside others" in result.detail


def test_a_model_that_is_blind_is_found(monkeypatch):
    prefill = ModelView.prefill

    def without_pixels(self, prompts, *rest):
        prompts = [{n: v.abs() if n == "pixel_values" else v for n, v in prompt.items()} for prompt in prompts]
        return prefill(self, prompts, *rest)

    monkeypatch.setattr(ModelView, "prefill", without_pixels)
    (result,) = random_kit("llava").run([images])
    assert not result.passed and "prompt 0 is answered in the same way with other pixels" in result.detail


def test_what_is_held_is_found(monkeypatch):
    kit = random_kit("llava")
    make = kit.generator

    def leaking(**settings):
        generator = make(**settings)
        generator.engine.pool.append([generator.engine.pool.create()], [1])
        generator.engine.schedule._free_unowned = lambda: None
        return generator

    monkeypatch.setattr(kit, "generator", leaking)
    (result,) = kit.run([windows])
    assert not result.passed and "1 pages and 0 images are still held" in result.detail


def test_wrong_text_and_tags_are_found(tiny, monkeypatch):
    kit = Kit(tiny.model, tiny.processor, [random_kit("llava").prompts[0]])
    assert [result.passed for result in kit.run(TEXT_CHECKS)] == [True, True]
    check_text("aé", [0, 1, 2], [b"a", b"\xc3", b"\xa9"])
    for ids in ([0, 1], [0, 1, 2, 0]):
        with pytest.raises(Mismatch, match="the tokens of 'aé' spell"):
            check_text("aé", ids, [b"a", b"\xc3", b"\xa9"])
    monkeypatch.setattr(StageTags, "advance", lambda self, state, token: (0, -1, 0))
    (result,) = kit.run([stop_tags])
    assert not result.passed and "is found" in result.detail
    monkeypatch.setattr("llava_cot.detokenise.Detokeniser.add", lambda self, ids: "x" * len(ids))
    (result,) = kit.run([token_text])
    assert not result.passed


def test_the_command():
    runner = CliRunner()
    passed = runner.invoke(cli.app, ["check", "tiny"])
    assert passed.exit_code == 0 and passed.stdout.count("ok") >= 10 and "retraces" in passed.stdout


def test_the_command_fails(monkeypatch):
    spoil(monkeypatch, lambda logits: logits.flip(-1))
    failed = CliRunner().invoke(cli.app, ["check", "pixtral", "--random"])
    assert failed.exit_code == 1 and "failed" in failed.stdout and "differs from generate" in failed.stdout


def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype must be"):
        load_kit("llava", random=True, dtype="int3")
    with pytest.raises(ValueError, match="device must be one that torch can use here"):
        load_kit("llava", random=True, device="cuda:77" if torch.cuda.is_available() else "cuda")
