"""SWIRES as a plain loop over ``model.generate``: no paging, no sharing, no engine, nothing of its code.

``PublishedWay`` is what the authors' script does: every candidate is its own ``generate`` call at batch 1, which
encodes the image and the whole prefix again and decodes the text after every token to look for a closing tag.
``CachedWay`` is the careful version of the same loop: the prompt's cache, image included, is kept and copied, and the
candidates of one parent run as a batch of transformers' own. ``PaddedWay`` is for tests of many questions: all their
candidates of a moment are one left-padded batch of transformers' own. All draw with the package's seeded sampler, so
that they can be compared token for token.
"""

import copy
import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from llava_cot.search.tree import candidate_seed
from llava_cot_kernels.sampling import sample

ORDER = ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
CLOSING = [f"</{stage}>" for stage in ORDER]
KINDS = {"mm_token_type_ids", "token_type_ids"}  # which tokens are of images
PIXELS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@dataclass
class Text:
    """A candidate: the token ids it added, their log-probs, and how it ended."""

    tokens: list[int]
    logprobs: list[float]
    top2_gaps: list[float]  # of the logits each token was drawn from
    closed_by: str | None  # the first closing tag in its text
    ended: bool  # with EOS


@dataclass
class Counts:
    """What ``generate`` had to compute."""

    prefilled: int = 0
    decoded: int = 0
    image_encodings: int = 0


class SeededDraw(LogitsProcessor):
    """Leaves one token possible in each row: the one that this row's seed draws."""

    def __init__(self, seeds, params, backend, padding=0):
        self.seeds, self.params, self.backend, self.padding = torch.as_tensor(seeds), params, backend, padding
        self.logprobs, self.gaps = [], []

    def __call__(self, input_ids, scores):
        p = self.params
        drawn = sample(
            scores,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            seed=self.seeds.to(scores.device),
            position=input_ids.shape[1] - self.padding,
            backend=self.backend,
        )
        self.logprobs.append(drawn.logprob.tolist())
        best = scores.float().topk(2).values
        self.gaps.append((best[:, 0] - best[:, 1]).tolist())
        return torch.full_like(scores, -math.inf).scatter(1, drawn.token[:, None], 0.0)


class StopOnTags(StoppingCriteria):
    """Decodes what was generated, in every row and after every token, and looks for a closing tag."""

    def __init__(self, tokenizer, start):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([any(tag in text for tag in CLOSING) for text in texts], device=input_ids.device)


class PublishedWay:
    """One ``generate`` call per candidate, from pixels."""

    def __init__(self, model, tokenizer, inputs, backend="reference"):
        self.model, self.tokenizer, self.inputs, self.backend = model, tokenizer, dict(inputs), backend
        self.prompt = self.inputs.pop("input_ids")
        self.counts = Counts()

    def draw(self, prefix, seeds, params, limit, stop_at_tags=True):
        return [self._generate(prefix, [seed], params, limit, stop_at_tags, {})[0] for seed in seeds]

    def _generate(self, prefix, seeds, params, limit, stop_at_tags, cache, **settings):
        drawn = torch.tensor([prefix], dtype=torch.int64, device=self.prompt.device)
        rows = len(seeds) // settings.get("num_return_sequences", 1)
        ids = torch.cat([self.prompt, drawn], dim=1).expand(rows, -1)
        start = ids.shape[1]
        per_token = ("attention_mask", "cross_attention_mask", *KINDS)
        given = cache or {k: v for k, v in self.inputs.items() if k not in per_token}
        mask = self.inputs.get("cross_attention_mask")
        if mask is not None:  # what is drawn sees what the prompt's last token sees
            mask = torch.cat([mask, mask[:, -1:].expand(-1, start - mask.shape[1], -1, -1)], dim=1)
            given["cross_attention_mask"] = mask.expand(rows, -1, -1, -1)
        for name in KINDS & self.inputs.keys():  # and is text
            given[name] = torch.nn.functional.pad(self.inputs[name], (0, start - self.prompt.shape[1]))
        draw = SeededDraw(seeds, params, self.backend)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **given,
            **{"do_sample": False, "temperature": None, "top_p": None, **settings},
            max_new_tokens=limit,
            logits_processor=[draw],
            stopping_criteria=[StopOnTags(self.tokenizer, start)] if stop_at_tags else [],
        )
        if not cache:
            self.counts.image_encodings += len(seeds)
            self.counts.prefilled += start * len(seeds)
        self.counts.decoded += (out.shape[1] - start - 1) * len(seeds)
        return [self._text(row, out[row, start:].tolist(), draw) for row in range(len(seeds))]

    def _text(self, row, tokens, draw):
        logprobs, gaps = ([step[row] for step in steps] for steps in (draw.logprobs, draw.gaps))
        return self._cut(tokens, logprobs, gaps)

    def _cut(self, tokens, logprobs, gaps):
        """The candidate that ends with its first EOS or with the token that completes its first closing tag."""
        eos = self.model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]

        def tags_in(end):
            text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
            return sorted((tag for tag in CLOSING if tag in text), key=text.index)

        first_eos = next((at + 1 for at, token in enumerate(tokens) if token in eos), len(tokens))
        # A text that has a tag keeps it as it grows, so that its first end is found by bisection.
        end = 1 + bisect_left(range(1, first_eos), True, key=lambda end: bool(tags_in(end)))
        ended, found = tokens[end - 1] in eos, tags_in(end)
        closed_by = found[0] if found and not ended else None
        return Text(tokens[:end], logprobs[:end], gaps[:end], closed_by, ended)


class CachedWay(PublishedWay):
    """The prompt and its image are computed once; the candidates of a parent are one batch."""

    def __init__(self, model, tokenizer, inputs, backend="reference"):
        super().__init__(model, tokenizer, inputs, backend)
        self.cache = DynamicCache(config=model.config.get_text_config())
        given = {k: v for k, v in self.inputs.items() if k != "attention_mask"}
        given["cross_attention_mask"] = given["cross_attention_mask"][:, :-1]
        with torch.inference_mode():
            model(input_ids=self.prompt[:, :-1], **given, past_key_values=self.cache, use_cache=True)
        self.counts.image_encodings += 1
        self.counts.prefilled += self.prompt.shape[1] - 1

    def draw(self, prefix, seeds, params, limit, stop_at_tags=True):
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(seeds))
        self.counts.prefilled += (len(prefix) + 1) * len(seeds)
        return self._generate(prefix, seeds, params, limit, stop_at_tags, {"past_key_values": cache})


class PaddedWay(PublishedWay):
    """One batch for the candidates of many questions. What was drawn once is not drawn again.

    Each text that is continued is computed once, from pixels. After every ``chunk`` tokens the rows that have ended
    leave the batch, and ``generate`` goes on with the others.
    """

    chunk = 12

    def __init__(self, model, tokenizer, questions, backend="reference"):
        self.model, self.tokenizer, self.questions, self.backend = model, tokenizer, questions, backend
        self.drawn = {}

    def draw_all(self, asked, params):
        """The candidates of each ``(question, prefix, seeds, limit)``."""
        wanted = [[(at, tuple(prefix), seed, limit, params) for seed in seeds] for at, prefix, seeds, limit in asked]
        new = list(dict.fromkeys(candidate for row in wanted for candidate in row if candidate not in self.drawn))
        if new:
            self.drawn.update(zip(new, self._generate_all(new, params), strict=True))
        return [[self.drawn[candidate] for candidate in row] for row in wanted]

    def _generate_all(self, candidates, params):
        contexts = list(dict.fromkeys((at, prefix) for at, prefix, *_ in candidates))
        of = torch.tensor([contexts.index((at, prefix)) for at, prefix, *_ in candidates])
        ids, mask, cross_mask, cache = self._prefill(contexts)
        start, seeds = ids.shape[1], torch.tensor([seed for _, _, seed, _, _ in candidates])
        padding, longest = (start - mask.sum(1))[of], max(limit for *_, limit, _ in candidates)
        cache.batch_select_indices(of)
        ids, mask, cross_mask = ids[of], mask[of], cross_mask[of]
        growing, drawn = torch.arange(len(candidates)), [([], [], []) for _ in candidates]
        while len(growing):
            draw, before = SeededDraw(seeds[growing], params, self.backend, padding[growing]), ids.shape[1]
            stop = StopOnTags(self.tokenizer, start)
            ids = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                cross_attention_mask=cross_mask,
                past_key_values=cache,
                do_sample=False,
                temperature=None,
                top_p=None,
                max_new_tokens=min(self.chunk, start + longest - before),
                logits_processor=[draw],
                stopping_criteria=[stop],
            )
            new = ids[:, before:].tolist()
            for row, at in enumerate(growing.tolist()):
                for column, steps in zip(drawn[at], (zip(*new), draw.logprobs, draw.gaps)):
                    column += [step[row] for step in steps]
            rest = [row for row, at in enumerate(growing.tolist()) if self._grows(drawn[at][0], candidates[at])]
            rest = torch.tensor(rest, dtype=torch.int64)
            more = ids.shape[1] - before
            mask = torch.cat([mask, mask.new_ones(len(mask), more)], dim=1)[rest]
            cross_mask = torch.cat([cross_mask, cross_mask[:, -1:].expand(-1, more, -1, -1)], dim=1)[rest]
            growing, ids = growing[rest], ids[rest]
            cache.batch_select_indices(rest)
        limits = [limit for *_, limit, _ in candidates]
        return [self._cut(*(column[:limit] for column in columns)) for columns, limit in zip(drawn, limits)]

    def _grows(self, tokens, candidate):
        *_, limit, _ = candidate
        text = self._cut(tokens, tokens, tokens)
        return len(tokens) < limit and not text.ended and text.closed_by is None

    def _prefill(self, contexts):
        """The padded tokens and masks of each ``(question, prefix)``, and the cache of all but their last tokens."""
        inputs = [self.questions[at] for at, _ in contexts]
        rows = [torch.tensor([*i["input_ids"][0].tolist(), *prefix]) for i, (_, prefix) in zip(inputs, contexts)]
        masks = [i["cross_attention_mask"][0] for i in inputs]
        masks = [torch.cat([m, m[-1:].expand(len(row) - len(m), -1, -1)]) for m, row in zip(masks, rows)]
        ids, mask, cross_mask = _pad_left(rows), _pad_left([torch.ones_like(row) for row in rows]), _pad_left(masks)
        cache = DynamicCache(config=self.model.config.get_text_config())
        with torch.inference_mode():
            self.model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
                cross_attention_mask=cross_mask[:, :-1],
                **{key: torch.cat([i[key] for i in inputs]) for key in PIXELS},
                past_key_values=cache,
                logits_to_keep=1,
            )
        return ids, mask, cross_mask, cache


def _pad_left(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")


@dataclass
class PlainNode:
    id: int
    parent: "PlainNode | None"
    stage: str
    round: int
    index: int
    text: Text
    score: float = 0.0
    kept: bool = False

    def path(self):
        return (self.parent.path() if self.parent else []) + [self]

    def tokens(self):
        return [token for node in self.path() for token in node.text.tokens]

    def closed(self):
        return self.text.closed_by == f"</{self.stage}>"

    def order(self):
        return (not self.closed(), -self.score, self.round, self.parent.id if self.parent else 0, self.index)


@dataclass
class Result:
    nodes: list[PlainNode] = field(default_factory=list)
    retraces: list[tuple[str, str, int]] = field(default_factory=list)
    answer: PlainNode | None = None


def mean_logprob(nodes):
    """The confidence scorer: of the texts of these nodes together."""
    logprobs = [value for node in nodes for value in node.text.logprobs]
    return sum(logprobs) / len(logprobs)


def swires(way, config, *, cutoff, seed, score=mean_logprob):
    """The search on one question."""
    search = plain_swires(config, cutoff, seed, score)
    asked = next(search)
    while True:
        try:
            asked = search.send([way.draw(prefix, seeds, config.params(), limit) for prefix, seeds, limit in asked])
        except StopIteration as end:
            return end.value


def swires_of_all(way, configs, *, cutoffs, seed, score=mean_logprob):
    """The same search on each question of a ``PaddedWay``, with each of ``configs``: a list of results for each.

    What the searches of all configurations ask for at one time is one batch; they draw with the same parameters.
    """
    (params,) = {config.params() for config in configs}
    searches = {
        (number, at): plain_swires(config, cutoff, seed, score)
        for number, (config, cutoff) in enumerate(zip(configs, cutoffs, strict=True))
        for at in range(len(way.questions))
    }
    results = [[None] * len(way.questions) for _ in configs]
    asked = {place: next(search) for place, search in searches.items()}
    while asked:
        drawn = iter(way.draw_all([(at, *one) for (_, at), many in asked.items() for one in many], params))
        for (number, at), many in list(asked.items()):
            try:
                asked[number, at] = searches[number, at].send([next(drawn) for _ in many])
            except StopIteration as end:
                results[number][at] = end.value
                del asked[number, at]
    return results


def plain_swires(config, cutoff, seed, score):
    """The search, written down again from the paper: ``cutoff(stage)`` is a number or None.

    Yields what it asks for, ``(prefix, seeds, limit)`` for each parent of a stage, and is sent the texts of each.
    """
    result, known = Result(), {}
    parents = {"SUMMARY": [None]}
    pools = {stage: [] for stage in ORDER}
    at, round_ = 0, 1
    while True:
        stage = ORDER[at]
        count = max(1, config.candidates[stage] // len(parents[stage]))
        asked = []
        for parent in parents[stage]:
            prefix = parent.tokens() if parent else []
            parent_id = parent.id if parent else 0
            seeds = [candidate_seed(seed, stage, round_, parent_id, index) for index in range(count)]
            limit = min(config.max_new_tokens - len(prefix), config.max_stage_tokens.get(stage, config.max_new_tokens))
            asked.append((prefix, seeds, limit))
        new = []
        for parent, texts in zip(parents[stage], (yield asked), strict=True):
            for index, text in enumerate(texts):
                new.append(PlainNode(len(result.nodes) + len(new) + 1, parent, stage, round_, index, text))
        result.nodes += new
        whole = stage == "CONCLUSION" and config.final_scope == "path"
        for node in new:
            node.score = known.setdefault((whole, tuple(node.tokens())), score(node.path() if whole else [node]))
        pools[stage] += new
        good = sorted((n.score for n in pools[stage] if n.closed()), reverse=True)
        limit = cutoff(stage)
        passed = limit is None or (len(good) >= config.pass_rank and good[config.pass_rank - 1] > limit)
        if not passed and stage in config.retrace and round_ < config.max_rounds:
            round_ += 1
            at = ORDER.index(config.retrace[stage])
            result.retraces.append((stage, ORDER[at], round_))
            continue
        kept = sorted(pools[stage], key=PlainNode.order)[: config.keep[stage]]
        pools[stage] = []
        for node in kept:
            node.kept = True
        growing = [n for n in kept if not n.text.ended and len(n.tokens()) < config.max_new_tokens]
        if stage == "CONCLUSION" or not growing:
            result.answer = kept[0]
            return result
        at += 1
        parents[ORDER[at]] = growing
