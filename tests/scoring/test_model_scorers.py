"""Scorers that ask the searching model: the judge and the look-ahead, against transformers alone."""

import pytest
import torch

from llava_cot import SwiresConfig
from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot.scoring import JudgeScorer, confidence, look_ahead
from llava_cot.scoring.judge import PAIRWISE, YES_NO
from llava_cot.search import BestOfNConfig

SAMPLE = shapes.sample(802_003)
CONFIG = SwiresConfig.published(max_new_tokens=160, cutoff=-100.0)


def ask(generator, config):
    answer = generator.answer(SAMPLE.image, SAMPLE.question, config, seed=5)
    assert generator.engine.pages_in_use == generator.engine.images_in_use == 0
    return answer


def next_logprobs(model, processor, tokens, behind):
    """transformers alone: after the prompt, ``tokens`` and the text ``behind``."""
    inputs = build_inputs(processor, SAMPLE.image, SAMPLE.question, "one")
    suffix = processor.tokenizer(behind, add_special_tokens=False).input_ids
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*tokens, *suffix]])], 1)
    mask = inputs["cross_attention_mask"]
    mask = torch.cat([mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1, -1)], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
    with torch.inference_mode():
        return torch.log_softmax(model(**inputs).logits[0, -1], -1)


def turn(question):
    end = "<|eot_id|><|start_header_id|>"
    return f"{end}user<|end_header_id|>\n\n{question}{end}assistant<|end_header_id|>\n\n"


def probability(judge, logprobs):
    for_it, against = (logprobs[ids].logsumexp(0) for ids in judge._ids)
    return torch.sigmoid(for_it - against).item()


def label_mass(judge, logprobs):
    return logprobs[judge._ids[0] + judge._ids[1]].exp().sum().item()


def paths(answer):
    nodes = {node["id"]: node for node in answer.trace.data["nodes"]}

    def tokens(node):
        return (tokens(nodes[node["parent"]]) if node["parent"] else []) + node["tokens"]

    return [(node, tokens(node)) for node in nodes.values()]


def test_yes_or_no_is_asked_behind_the_candidate(tiny, fresh_tiny):
    judge = JudgeScorer(tiny.processor)
    answer = ask(tiny, SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=judge))
    checked = 0
    for node, tokens in paths(answer):
        logprobs = next_logprobs(fresh_tiny, tiny.processor, tokens, turn(YES_NO.format(stage=node["stage"])))
        assert node["score"] == pytest.approx(probability(judge, logprobs), abs=1e-4)
        assert node["notes"] == {"label_mass": pytest.approx(label_mass(judge, logprobs), rel=1e-3)}
        checked += 1
    assert checked == 11
    one_by_one = answer.usage
    assert one_by_one.steps < one_by_one.decoded_tokens  # read beside what grows, as one batch for each stage
    suffix = len(tiny.processor.tokenizer(turn(YES_NO.format(stage="REASONING")), add_special_tokens=False).input_ids)
    assert one_by_one.prompt_tokens < 40 + 11 * (suffix + 2)  # nothing but the question was read


def test_pairs_are_asked_in_both_orders_behind_the_prompt(tiny, fresh_tiny):
    judge = JudgeScorer(tiny.processor, "pairwise")
    answer = ask(tiny, BestOfNConfig(n=3, max_new_tokens=160, temperature=1.0, scorer=judge))
    nodes = answer.trace.data["nodes"]
    texts = [node["text"].strip() for node in nodes]
    assert len(set(texts)) == 3
    for at, node in enumerate(nodes):
        wins, masses = [], []
        for other in {0, 1, 2} - {at}:
            for first, second in ((at, other), (other, at)):
                asked = PAIRWISE.format(stage="answer", first=texts[first], second=texts[second])
                logprobs = next_logprobs(fresh_tiny, tiny.processor, [], turn(asked))
                masses.append(label_mass(judge, logprobs))
                win = probability(judge, logprobs)
                wins.append(win if first == at else 1 - win)
        assert node["score"] == pytest.approx(sum(wins) / len(wins), abs=1e-4)
        assert node["notes"] == {"label_mass": pytest.approx(sum(masses) / len(masses), rel=1e-3)}


def test_a_whole_answer_ends_its_turn_once(tiny, fresh_tiny):
    judge = JudgeScorer(tiny.processor)
    answer = ask(tiny, BestOfNConfig(n=2, max_new_tokens=160, scorer=judge))
    for node, tokens in paths(answer):
        assert node["finish"] == "eos"
        behind = turn(YES_NO.format(stage="answer")).removeprefix("<|eot_id|>")
        logprobs = next_logprobs(fresh_tiny, tiny.processor, tokens, behind)
        assert node["score"] == pytest.approx(probability(judge, logprobs), abs=1e-4)


def test_a_written_verdict(tiny):
    judge = JudgeScorer(tiny.processor, generate=True)
    assert [judge._read(t) for t in ("Yes, it is.", "no", "maybe", "It is NO good", "nothing")] == [1, 0, 0.5, 0, 0.5]
    answer = ask(tiny, SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=judge))
    assert {node["score"] for node in answer.trace.data["nodes"]} <= {0.0, 0.5, 1.0}
    assert not any(node["notes"] for node in answer.trace.data["nodes"])
    drawn = sum(len(node["tokens"]) for node in answer.trace.data["nodes"])
    assert drawn < answer.usage.generated_tokens <= drawn + 11 * 16


def greedy_endings(tiny, model, paths):
    """transformers alone: what follows each of ``paths``, which are padded on the left to one batch."""
    inputs = build_inputs(tiny.processor, SAMPLE.image, SAMPLE.question, "one")
    longest, padded = max(map(len, paths)), []
    for tokens in paths:
        pad = (longest - len(tokens), 0)
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
        mask = inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, len(tokens), -1, -1)], 1)
        padded.append(
            {
                "input_ids": torch.nn.functional.pad(ids, pad, value=tiny.processor.tokenizer.pad_token_id),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pad),
                "cross_attention_mask": torch.nn.functional.pad(mask, (0, 0, 0, 0, *pad)),
            }
        )
    rows = {name: value.expand(len(paths), *value.shape[1:]) for name, value in inputs.items()}
    rows |= {name: torch.cat([row[name] for row in padded]) for name in padded[0]}
    shortest = min(map(len, paths))
    out = model.generate(**rows, do_sample=False, max_new_tokens=160 - shortest)[:, rows["input_ids"].shape[1] :]
    return [row[: 160 - len(tokens)] for row, tokens in zip(out, paths)]


def test_look_ahead_is_the_vote_of_greedy_endings(tiny, fresh_tiny):
    answer = ask(tiny, SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=look_ahead))
    for stage in ("CAPTION", "REASONING"):
        group = [(node, tokens) for node, tokens in paths(answer) if node["stage"] == stage]
        said, weights = [], []
        for (node, _), ending in zip(group, greedy_endings(tiny, fresh_tiny, [tokens for _, tokens in group])):
            text = tiny.processor.tokenizer.decode(ending, skip_special_tokens=True)
            said.append(text.partition("<CONCLUSION>")[2].partition("</CONCLUSION>")[0].strip())
            weights.append(2.718281828459045 ** (sum(node["logprobs"]) / len(node["logprobs"])))
        for (node, _), own in zip(group, said):
            votes = sum(weight for weight, text in zip(weights, said) if text == own)
            assert node["score"] == pytest.approx(votes / sum(weights), abs=1e-4)


def test_the_judges_of_several_questions_read_in_one_batch(tiny):
    samples = [shapes.sample(seed) for seed in range(802_000, 802_003)]
    config = SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=JudgeScorer(tiny.processor))
    together = tiny.answer_batch([s.image for s in samples], [s.question for s in samples], config)
    for sample, answer in zip(samples, together):
        alone = tiny.answer(sample.image, sample.question, config)
        assert answer.tokens == alone.tokens
        for one, other in zip(answer.trace.data["nodes"], alone.trace.data["nodes"]):
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_what_no_judge_may_be(tiny):
    with pytest.raises(ValueError, match="mode must be 'yes_no' or 'pairwise', got 'vibes'"):
        JudgeScorer(tiny.processor, "vibes")
    with pytest.raises(ValueError, match="words must begin with different tokens"):
        JudgeScorer(tiny.processor, words=("right", "right"))


# A scorer that fails marks its candidate, and the search goes on.


def sometimes(failing, how):
    """``confidence`` that fails on the candidates with these texts."""

    def scorer(spans):
        if any(span.text in failing for span in spans) and how == "raises":
            raise RuntimeError("no score today")
        return [how if span.text in failing else score for span, score in zip(spans, confidence(spans))]

    return scorer


@pytest.fixture(scope="module")
def plain(tiny):
    return ask(tiny, CONFIG)


@pytest.mark.parametrize("how", ["raises", float("nan"), float("inf"), float("-inf")])
def test_a_failed_score_marks_its_candidate(tiny, plain, how):
    (first,) = [node for node in plain.trace.data["nodes"] if node["stage"] == "CAPTION" and node["kept"]][:1]
    answer = ask(
        tiny, SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=sometimes({first["text"]}, how))
    )
    marked = [node for node in answer.trace.data["nodes"] if node["error"]]
    assert marked and all(node["text"] == first["text"] and node["score"] == float("-inf") for node in marked)
    assert all(("no score today" if how == "raises" else f"the score is {how}") in node["error"] for node in marked)
    assert not any(node["kept"] for node in marked) and answer.conclusion
    assert set(answer.trace.events("failed")[0]["errors"]) <= {str(node["id"]) for node in marked}


def test_nothing_left_ends_the_search_and_its_neighbours_go_on(tiny):
    samples = [shapes.sample(seed) for seed in range(802_000, 802_003)]

    def scorer(spans):
        if any(span.question == samples[1].question for span in spans):
            raise RuntimeError("no score today")
        return confidence(spans)

    config = SwiresConfig.published(max_new_tokens=160, cutoff=-100.0, scorer=scorer)
    images, questions = [s.image for s in samples], [s.question for s in samples]
    first, failed, last = tiny.answer_batch(images, questions, config, return_exceptions=True)
    assert isinstance(failed, RuntimeError) and "raised for every candidate" in failed.__notes__[0]
    assert first.tokens == ask_of(tiny, samples[0]).tokens and last.tokens == ask_of(tiny, samples[2]).tokens
    with pytest.raises(RuntimeError, match="no score today"):
        tiny.answer_batch(images[:2], questions[:2], config)
    assert tiny.engine.pages_in_use == 0


def ask_of(generator, sample):
    return generator.answer(sample.image, sample.question, CONFIG)
