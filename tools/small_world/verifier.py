"""Train the bundled verifier on what the tiny policy writes: ``python -m tools.small_world.verifier OUT``.

Rollouts of the policy, which sees noisy images, are judged by a reward model that sees clean ones. One forward pass of
a rollout gives a score after every token, as the model is causal. Three losses:

- at the closing tags of CAPTION (are all objects right?), REASONING (does its verdict agree with the true answer?) and
  CONCLUSION (is it right?): the scores that a search uses;
- after every other token of these stages: is the stage free of false claims so far? That says where it goes wrong;
- next-token loss on the words that carry facts, with the true word as target, whatever the rollout says: a model that
  knows what should stand there learns to see what should not.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoProcessor, MllamaForConditionalGeneration, MllamaProcessor, get_cosine_schedule_with_warmup

from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.data import shapes
from llava_cot.generator import SwiresGenerator
from llava_cot.scoring.diagnostics import diagnose
from llava_cot.scoring.reward_model import RewardModel, RewardModelScorer
from llava_cot.scoring.scorer import Span
from llava_cot.stages import Stage, parse
from llava_cot.tiny import tiny_path
from tools.small_world.processor import prompt
from tools.small_world.scorers import JUDGED, World, judge

FIRST_SEED = 210_000  # the policy was trained on the ones before
TRAIN_END = 600_000
DEV_SEEDS = range(710_000, 711_000)
QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Rollout:
    seed: int  # of the sample
    text: str


def draw_rollouts(policy: SwiresGenerator, seeds: range, n: int, temperature: float) -> Iterator[Rollout]:
    """``n`` whole answers of the policy to each sample."""
    settings: dict[str, Any] = {"n": n, "temperature": temperature, "top_p": 1.0, "max_new_tokens": 200}
    for start in range(0, len(seeds), QUESTIONS_AT_ONCE):
        some = seeds[start : start + QUESTIONS_AT_ONCE]
        samples = [shapes.sample(seed) for seed in some]
        images, questions = [s.image for s in samples], [s.question for s in samples]
        answers = policy.answer_batch(images, questions, "best_of_n", seed=some[0], **settings)
        for seed, answer in zip(some, answers):
            yield from (Rollout(seed, node["text"]) for node in answer.trace.data["nodes"])


class Batch:
    """Rollouts as model inputs, right-padded, and what is to be learnt at each token [B, T].

    ``closes`` and ``claims`` are 1 (right), 0 (wrong) or NaN (no label); ``truths`` are next tokens, or -100.
    """

    def __init__(self, processor: MllamaProcessor, rollouts: list[Rollout], chance: random.Random) -> None:
        tokenizer = processor.tokenizer
        samples = [shapes.sample(rollout.seed) for rollout in rollouts]
        views = [[shapes.clean_view(rollout.seed)] for rollout in rollouts]
        prompts = [prompt(processor, sample.question) for sample in samples]
        texts = [p + rollout.text for p, rollout in zip(prompts, rollouts)]
        options = {"add_special_tokens": False, "padding": True, "padding_side": "right"}
        self.inputs = dict(processor(images=views, text=texts, **options, return_tensors="pt"))
        offsets = tokenizer(texts, **options, return_offsets_mapping=True)["offset_mapping"]
        ids = self.inputs["input_ids"]
        self.closes, self.claims = torch.full(ids.shape, torch.nan), torch.full(ids.shape, torch.nan)
        self.truths = torch.full(ids.shape, -100)
        bare = tokenizer.convert_tokens_to_ids(">")
        for row, (sample, rollout, spans) in enumerate(zip(samples, rollouts, offsets)):
            offset = len(prompts[row])
            ends = torch.tensor([end for _, end in spans]) - offset
            for stage in judge(sample, rollout.text).values():
                # The token that has the last character of ...
                last = {end: int((ends >= end).nonzero()[0]) for end in (stage.end, *(w.end for w in stage.words))}
                first = int((ends > stage.start).nonzero()[0])
                close = last[stage.end]
                self.claims[row, first:close] = 1.0
                for word in stage.words:
                    if not word.right:
                        self.claims[row, last[word.end] : close] = 0.0
                    if word.truth is not None:
                        (self.truths[row, last[word.end] - 1],) = tokenizer(f" {word.truth}")["input_ids"][1:]
                self.closes[row, close] = float(stage.right)
                # ">" has the line breaks after it in its token, but a text that ends there has none.
                if chance.random() < 0.5:
                    ids[row, close] = bare


def train(
    model: RewardModel,
    lm_head: torch.nn.Linear,
    processor: MllamaProcessor,
    rollouts: list[Rollout],
    *,
    steps: int,
    stop: int | None,
    batch_size: int,
    lr: float,
    word_weight: float,
    seed: int,
) -> None:
    """AdamW with warm-up and cosine, bfloat16 compute; every pass over the rollouts in another order.

    ``word_weight`` is that of the next-token loss, beside two of weight 1.
    """
    chance = random.Random(seed)
    parameters = [*model.parameters(), *lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=80, num_training_steps=steps)
    model.set_attn_implementation("eager")  # on the CPU its backward pass takes half the time of SDPA's
    model.train()
    start = time.monotonic()
    queue: list[Rollout] = []
    for step in range(min(steps, stop or steps)):
        if len(queue) < batch_size:
            queue = chance.sample(rollouts, len(rollouts))
        some, queue = queue[:batch_size], queue[batch_size:]
        batch = Batch(processor, some, chance)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
            scores = model.head(hidden).squeeze(-1).float()
            words = lm_head(hidden[batch.truths >= 0]).float()
        losses = [_bce(scores, batch.closes), _bce(scores, batch.claims)]
        losses.append(cross_entropy(words, batch.truths[batch.truths >= 0]))
        (losses[0] + losses[1] + word_weight * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            shown = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step} minute {(time.monotonic() - start) / 60:.1f} closes, claims, words {shown}", flush=True)
    model.set_attn_implementation("sdpa")
    model.eval()


def _bce(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = ~labels.isnan()
    return binary_cross_entropy_with_logits(scores[known], labels[known])


def build_verifier(policy: MllamaForConditionalGeneration, layers: int, seed: int) -> RewardModel:
    """A reward model that starts as the policy, with text layers on top that change nothing at first."""
    config = deepcopy(policy.config)
    config.text_config.num_hidden_layers = layers
    torch.manual_seed(seed)
    model = RewardModel(config)
    missing, unexpected = model.model.load_state_dict(policy.model.state_dict(), strict=False)
    own = range(policy.config.text_config.num_hidden_layers, layers)
    assert not unexpected and all(int(name.split(".")[2]) in own for name in missing), missing
    with torch.no_grad():
        model.head.weight.zero_()
        for index in own:
            layer = model.model.language_model.layers[index]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def evaluate(scorer: RewardModelScorer, rollouts: list[Rollout]) -> dict[str, Any]:
    """What each stage's score says about the answer being right, and CAPTION's about the caption being right."""
    by_seed: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_seed.setdefault(rollout.seed, []).append(rollout)
    scorer.view = World(by_seed).clean_view
    samples = {seed: shapes.sample(seed) for seed in by_seed}
    right, exact, found = [], [], {}
    for seed, group in by_seed.items():
        right.append([shapes.is_correct(samples[seed], parse(r.text)["CONCLUSION"].text) for r in group])
        captions = [judge(samples[seed], rollout.text).get(Stage.CAPTION) for rollout in group]
        exact.append([caption is not None and caption.right for caption in captions])
    for stage in JUDGED:
        spans = [_span(samples[rollout.seed], rollout.text, stage) for group in by_seed.values() for rollout in group]
        scores = iter(scorer.get_scores(spans))
        by_question = [[next(scores) for _ in group] for group in by_seed.values()]
        found[f"answer by {stage}"] = asdict(diagnose(by_question, right))
        if stage is Stage.CAPTION:
            found["caption by CAPTION"] = asdict(diagnose(by_question, exact))
    return found


def _span(sample: shapes.Sample, text: str, stage: Stage) -> Span:
    """The path up to the end of ``stage``, or all there is."""
    head, close, _ = text.partition(stage.close_tag)
    path, question = head + close, sample.question
    return Span(path, [], [], [], stage=stage, path_text=path, load_images=lambda: [sample.image], question=question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the verifier and its processor")
    parser.add_argument("--policy", type=Path, default=tiny_path())
    parser.add_argument("--rollouts", type=Path, help="read them from this file, or write them if it is not there")
    parser.add_argument("--questions", type=int, default=16_832)
    parser.add_argument("--n", type=int, default=2, help="rollouts of a question")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=8, help="of the text model; the policy has 6")
    parser.add_argument("--init", type=Path, help="go on from this verifier instead of the policy")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--stop", type=int, help="leave the schedule after so many steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--word-weight", type=float, default=1.0, help="of the next-token loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dev-questions", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if FIRST_SEED + args.questions > TRAIN_END:
        parser.error(f"questions must end before seed {TRAIN_END}")
    policy = SwiresGenerator.from_pretrained(args.policy)
    if args.rollouts and args.rollouts.is_file():
        rollouts = [Rollout(**json.loads(line)) for line in args.rollouts.read_text().splitlines()]
    else:
        seeds = range(FIRST_SEED, FIRST_SEED + args.questions)
        rollouts = list(draw_rollouts(policy, seeds, args.n, args.temperature))
        if args.rollouts:
            args.rollouts.write_text("".join(json.dumps(vars(rollout)) + "\n" for rollout in rollouts))
    print(f"{len(rollouts)} rollouts", flush=True)
    model = (
        RewardModel.from_pretrained(args.init) if args.init else build_verifier(policy.model, args.layers, args.seed)
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    train(
        model,
        policy.model.lm_head,
        policy.processor,
        rollouts,
        steps=args.steps,
        stop=args.stop,
        batch_size=args.batch_size,
        lr=args.lr,
        word_weight=args.word_weight,
        seed=args.seed,
    )
    model.config.policy_sha256 = checkpoint_sha256(args.policy)
    model.save_pretrained(args.out)
    AutoProcessor.from_pretrained(args.policy).save_pretrained(args.out)
    dev = list(draw_rollouts(SwiresGenerator.from_pretrained(args.policy), DEV_SEEDS[: args.dev_questions], 16, 1.0))
    print(json.dumps(evaluate(RewardModelScorer.from_pretrained(args.out), dev), indent=1))


if __name__ == "__main__":
    main()
