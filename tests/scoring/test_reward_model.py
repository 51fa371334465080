"""Reward models as scorers: what they are shown, that batching changes nothing, and what is refused."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_cot import tiny_path
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.core import Call
from llava_cot.data import shapes
from llava_cot.scoring import Span
from llava_cot.scoring.reward_model import RewardModel, RewardModelScorer, verify_policy
from llava_cot.stages import render
from tools.small_world.scorers import JUDGED, World, judge
from tools.small_world.verifier import Batch, Rollout, build_verifier, draw_rollouts, evaluate

VERIFIER = tiny_path() / "verifier"
SEEDS = range(710_000, 710_020)


def span(seed: int, text: str | None = None) -> Span:
    sample = shapes.sample(seed)
    text = render(sample.stages) if text is None else text
    return Span(text, [], [], [], path_text=text, load_image=lambda: sample.image, question=sample.question)


@pytest.fixture(scope="module")
def scorer():
    return RewardModelScorer.from_pretrained(VERIFIER, view=World(SEEDS).clean_view)


@pytest.fixture(scope="module")
def spans():
    """Texts of many lengths about several images, stages cut off in the middle too, and an empty one."""
    cuts = [0, 1, 47, 101, 148, 230, 311, None]
    return [span(seed, render(shapes.sample(seed).stages)[:cut]) for seed in SEEDS[:3] for cut in cuts]


@pytest.fixture(scope="module")
def alone(scorer, spans):
    """The score of each of ``spans``, asked for by itself."""
    return [scorer.get_scores([one])[0] for one in spans]


@pytest.mark.parametrize("batch_size", [2, 5, 24, 100])
def test_a_batch_scores_as_each_alone(scorer, spans, alone, batch_size):
    batched = RewardModelScorer(scorer.model, scorer.processor, view=scorer.view, batch_size=batch_size)
    np.testing.assert_allclose(batched.get_scores(spans), alone, atol=1e-5, rtol=1e-5)
    assert len({round(score, 4) for score in alone}) > len(spans) // 2


def test_padding_does_not_matter(scorer):
    processor, sample = scorer.processor, shapes.sample(SEEDS[0])
    text = scorer._prompt(sample.question) + render(sample.stages)
    inputs = processor(images=[[sample.image]], text=[text], add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        plain = scorer.model(**inputs).logits
        for pad in (1, 7, 64):
            padded = dict(inputs)
            for name, fill in (("input_ids", 3), ("attention_mask", 0), ("cross_attention_mask", 0)):
                missing = inputs[name].new_full((1, pad, *inputs[name].shape[2:]), fill)
                padded[name] = torch.cat([inputs[name], missing], dim=1)
            torch.testing.assert_close(scorer.model(**padded).logits, plain, atol=1e-5, rtol=1e-5)
    assert plain.shape == (1, 1)


def test_line_breaks_behind_the_text_do_not_matter(scorer):
    text = render(shapes.sample(SEEDS[0]).stages)
    assert scorer.get_scores([span(SEEDS[0], text + "\n\n")]) == scorer.get_scores([span(SEEDS[0], text)])


def test_no_spans(scorer):
    assert scorer.get_scores([]) == []


def test_a_span_without_its_image(scorer):
    with pytest.raises(ValueError, match="needs the image and the question of every span, got None"):
        scorer.get_scores([Span("text", [], [], [], path_text="text")])


def test_the_engine_is_asked_to_call_it(scorer, spans):
    program = scorer(spans)
    (call,) = next(program)
    assert isinstance(call, Call) and call.function == scorer.get_scores and list(call.items) == spans
    with pytest.raises(StopIteration) as stop:
        program.send([[1.0, 2.0]])
    assert stop.value.value == [1.0, 2.0]


def test_round_trip(scorer, spans, tmp_path):
    scorer.model.save_pretrained(tmp_path)
    scorer.processor.save_pretrained(tmp_path)
    again = RewardModelScorer.from_pretrained(tmp_path, view=scorer.view)
    assert isinstance(again.model, RewardModel) and not again.model.training
    before, after = scorer.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.get_scores(spans) == scorer.get_scores(spans)
    verify_policy(tmp_path, tiny_path())


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc", "0" * 39, "0" * 41, "G" * 40])
def test_remote_code_without_a_pinned_revision(revision):
    with pytest.raises(ValueError, match="revision must be a commit of 40 hex digits with trust_remote_code"):
        RewardModelScorer.from_pretrained("nobody/nothing", revision=revision, trust_remote_code=True)


def test_another_policy(scorer, tmp_path):
    verify_policy(VERIFIER, tiny_path())
    verify_policy(scorer.model.config, tiny_path())
    verify_policy({"policy_sha256": checkpoint_sha256(tiny_path())}, tiny_path())
    (tmp_path / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"policy_path must hold the policy with policy_sha256=[0-9a-f]{64}, got"):
        verify_policy(VERIFIER, tmp_path)
    with pytest.raises(ValueError, match="policy_sha256=None"):
        verify_policy({}, tiny_path())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="policy_sha256=None, got None"):
        verify_policy({}, tmp_path)


def test_any_model_with_one_logit(spans, scorer):
    class LongerIsBetter(torch.nn.Linear):
        config, device, dtype = SimpleNamespace(num_labels=1), torch.device("cpu"), torch.float32

        def forward(self, attention_mask, **inputs):
            return SimpleNamespace(logits=attention_mask.sum(dim=1, keepdim=True).float())

    scores = RewardModelScorer(LongerIsBetter(1, 1), scorer.processor, batch_size=5).get_scores(spans)
    assert scores[:8] == sorted(scores[:8]) and scores[0] < scores[7]

    class Classifier(LongerIsBetter):
        config = SimpleNamespace(num_labels=3)

    with pytest.raises(ValueError, match="model must have one label, got num_labels=3"):
        RewardModelScorer(Classifier(1, 1), scorer.processor)


def test_a_model_that_scores_chats_about_image_files():
    class Chats:
        calls = 0

        def get_scores(self, chats, images, hd_num):
            self.calls += 1
            for (user, assistant), (file,) in zip(chats, images):
                assert user["role"] == "user" and assistant["role"] == "assistant"
                assert user["content"] == shapes.sample(SEEDS[0]).question
                assert Image.open(file).size == (96, 96) and hd_num == 4
            return [len(assistant["content"]) for _, assistant in chats]

    model = Chats()
    scorer = RewardModelScorer(model, view=lambda image: image.resize((96, 96)), batch_size=2, hd_num=4)
    assert scorer.get_scores([span(SEEDS[0], text) for text in ("four", "a", "three \n")]) == [4.0, 1.0, 5.0]
    assert model.calls == 2


def test_wrong_arguments(scorer):
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        RewardModelScorer(scorer.model, scorer.processor, batch_size=0)
    with pytest.raises(ValueError, match="processor must be given"):
        RewardModelScorer(scorer.model)


def test_it_prefers_right_to_wrong(scorer, tiny):
    rollouts = list(draw_rollouts(tiny, SEEDS, n=6, temperature=1.0))
    found = evaluate(scorer, rollouts)
    for stage in ("REASONING", "CONCLUSION"):
        assert found[f"answer by {stage}"]["auc"] > 0.8
    assert found["answer by CONCLUSION"]["selected"] > found["answer by CONCLUSION"]["mean"] + 0.2


def test_an_untrained_verifier_is_its_policy_with_idle_layers(scorer, fresh_tiny, spans):
    verifier = build_verifier(fresh_tiny, layers=8, seed=0)
    inputs = Batch(scorer.processor, [Rollout(SEEDS[0], spans[5].path_text)], random.Random(0)).inputs
    with torch.inference_mode():
        hidden = [model(**inputs).last_hidden_state for model in (verifier.model, fresh_tiny.model)]
    torch.testing.assert_close(*hidden, atol=1e-6, rtol=1e-5)
    assert fresh_tiny.config.text_config.num_hidden_layers == 6


def test_it_is_small():
    assert sum(file.stat().st_size for file in VERIFIER.iterdir()) <= 8_000_000


def test_what_is_right_is_judged_right():
    for seed in range(710_000, 710_200):
        sample = shapes.sample(seed)
        judged = judge(sample, render(sample.stages))
        assert list(judged) == list(JUDGED)
        for stage in judged.values():
            assert stage.right and all(word.right for word in stage.words)


def test_what_is_wrong_is_judged_wrong_from_there_on():
    sample = shapes.sample(710_003)
    text = render(sample.stages)
    caption = judge(sample, text)[JUDGED[0]]
    color = caption.words[4]  # of the second object
    assert text[color.start : color.end] == color.truth
    wrong = text[: color.start] + "purple" + text[color.end :]
    judged = judge(sample, wrong)
    assert [judged[stage].right for stage in JUDGED] == [False, True, True]
    assert [word.right for word in judged[JUDGED[0]].words[:6]] == [True] * 4 + [False, True]
    answer = text.replace(f"<CONCLUSION> {sample.answer} ", "<CONCLUSION> 77 ")
    assert [stage.right for stage in judge(sample, answer).values()] == [True, True, False]
    assert JUDGED[2] not in judge(sample, text.removesuffix("</CONCLUSION>"))


def test_labels_stand_at_their_tokens():
    processor = AutoProcessor.from_pretrained(tiny_path())
    sample = shapes.sample(710_003)
    batch = Batch(processor, [Rollout(710_003, render(sample.stages)), Rollout(710_003, "?")], random.Random(0))
    ids, decode = batch.inputs["input_ids"], processor.tokenizer.decode
    closing = (~batch.closes[0].isnan()).nonzero().flatten().tolist()
    assert [decode(ids[0, at - 1 : at + 1]).strip() for at in closing] == [f"{stage}>" for stage in JUDGED]
    known = batch.truths[0] >= 0
    assert torch.equal(batch.truths[0][:-1][known[:-1]], ids[0, 1:][known[:-1]])
    assert batch.closes[1].isnan().all() and batch.claims[1].isnan().all() and (batch.truths[1] < 0).all()
