"""Read the scores of steps: all of a text in one pass, or on an engine that keeps what it has read before."""

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llava_cot.core import Extend, Release, Replies, Request
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.families import Prompt
from llava_cot_kernels.stage_tags import StageTags

KEPT_PATHS = 64  # of a question; SWIRES draws 45 candidates in three rounds of four stages

Path = tuple[tuple[int, ...], ...]  # the tokens of each step


class Reading(NamedTuple):
    """What was read at the end of a step: its score, and the total probability of both verdicts' tokens if it has."""

    score: float
    label_mass: float | None = None


class Asked(NamedTuple):
    """A candidate whose steps are to be read. ``prompt`` returns one object for each question of a call."""

    memo: dict[Any, Any]  # lives as long as the question is asked about
    prompt: Callable[[], Prompt]
    path: Path


class FullReader:
    """Reads each text from its first token to its last, ``batch_size`` texts in one pass."""

    def __init__(self, model: PreTrainedModel, verdicts: tuple[int, int] | None, batch_size: int) -> None:
        self.model, self.verdicts, self.batch_size = model, verdicts, batch_size
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def read(self, asked: Sequence[Asked]) -> list[list[Reading]]:
        """Return the reading of every step of each candidate."""
        rows = [_row(one.prompt(), one.path) for one in asked]
        order = sorted(range(len(rows)), key=lambda at: (_image_shapes(rows[at]), rows[at]["input_ids"].shape[1]))
        found: list[list[Reading]] = [[] for _ in rows]
        while order:
            batch = [at for at in order[: self.batch_size] if _image_shapes(rows[at]) == _image_shapes(rows[order[0]])]
            del order[: len(batch)]
            ends = [_ends(rows[at], asked[at].path) for at in batch]
            for at, readings in zip(batch, self._read([rows[at] for at in batch], ends)):
                found[at] = readings
        return found

    @torch.inference_mode()
    def _read(self, rows: list[Prompt], ends: list[list[int]]) -> list[list[Reading]]:
        model, kept = self.model, sorted({end for own in ends for end in own})
        padding = int(getattr(model.config, "image_token_id", None) == 0)  # padding must not look like an image
        inputs: dict[str, Any] = {}
        for name, tensor in rows[0].items():
            values = [row[name] for row in rows]
            value = padding if name == "input_ids" else 0
            stacked = (
                pad_sequence([own[0] for own in values], batch_first=True, padding_value=value)
                if _is_per_token(tensor, rows[0])
                else torch.cat(values)
            )
            inputs[name] = stacked.to(model.device, dtype=model.dtype if stacked.is_floating_point() else None)
        if self._keeps:
            inputs["logits_to_keep"] = torch.tensor(kept, device=model.device)
        logits = model(**inputs).logits
        labels = range(1, 3) if self.verdicts is None else range(max(self.verdicts) + 1, logits.shape[-1] + 1)
        if logits.dim() != 3 or logits.shape[-1] not in labels:
            raise ValueError(
                "model must return logits [batch, tokens, "
                f"{'vocabulary' if self.verdicts else '1 or 2'}], got {list(logits.shape)}"
            )
        columns = [[kept.index(end) for end in own] if self._keeps else own for own in ends]
        return [self._readings(logits[row, own].float()) for row, own in enumerate(columns)]

    def _readings(self, logits: torch.Tensor) -> list[Reading]:
        """Return the readings of one text from the logits [S, V] or [S, labels] at its S steps."""
        if self.verdicts is not None:
            return [_reading(*pair) for pair in logits.log_softmax(-1)[:, list(self.verdicts)].tolist()]
        one = logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]
        return [Reading(score) for score in one.tolist()]


class _Question:
    """A question on the engine, and the paths that have been read behind it, the longest unused one first."""

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        self.session = engine.open(prompt)
        self.paths: dict[Path, tuple[int, list[Reading]]] = {(): (self.session.root, [])}
        self.stale: list[int] = []  # continuations that are to be released
        self.is_over = False
        weakref.finalize(self, self.session.close).atexit = False

    def known(self, path: Path) -> int:
        """Return how many steps of ``path`` have been read. They count as used now, the shorter ones last."""
        known = 0
        for end in range(len(path), -1, -1):
            if (found := self.paths.pop(path[:end], None)) is not None:
                self.paths[path[:end]] = found
                known = max(known, end)
        return known

    def forget(self) -> None:
        """Forget the paths beyond ``KEPT_PATHS`` that have not been used for longest."""
        excess = max(0, len(self.paths) - 1 - KEPT_PATHS)
        self.stale += [self.paths.pop(path)[0] for path in [*self.paths][:excess]]

    def requests(self, paths: Sequence[Path], verdicts: tuple[int, int]) -> list[Request]:
        """Return what asks for the last step of each of ``paths``."""
        stale, self.stale = self.stale, []
        release: list[Request] = [Release(tuple(stale))] if stale else []
        return release + [Extend(self.paths[path[:-1]][0], path[-1], want=verdicts) for path in paths]

    def note(self, paths: Sequence[Path], reply: list[Any]) -> None:
        """Note the answers to ``requests``."""
        for path, (continuation,) in zip(paths, reply[-len(paths) :], strict=True):
            readings = [*self.paths[path[:-1]][1], _reading(*continuation.wanted)]
            self.paths[path] = continuation.id, readings


class EngineReader:
    """Reads the steps that are new since the last time. The image and the paths that were read keep their pages.

    A question is one session of the engine. It stands in the ``memo`` of those who ask about it, and is closed when
    nobody holds it any more. The new steps of all candidates, also of several questions, are read in one pass for each
    level of the tree, of ``batch_size`` candidates at most.
    """

    def __init__(
        self, model: PreTrainedModel, verdicts: tuple[int, int], batch_size: int, config: EngineConfig
    ) -> None:
        self.engine = Engine(model, StageTags([], []), config=config)
        self.verdicts, self.batch_size = verdicts, batch_size
        self._questions: weakref.WeakSet[_Question] = weakref.WeakSet()

    def read(self, asked: Sequence[Asked]) -> list[list[Reading]]:
        """Return the reading of every step of each candidate.

        Raises:
            OutOfPages: the KV cache is too small for one question alone.
        """
        questions = self._open(asked)
        while True:
            wanted = dict[tuple[_Question, Path], None]()  # without those that are asked for twice
            for question, one in zip(questions, asked):
                if (known := question.known(one.path)) < len(one.path):
                    wanted[question, one.path[: known + 1]] = None
            if not wanted:
                return [question.paths[one.path][1] for question, one in zip(questions, asked)]
            together: dict[_Question, list[Path]] = {}
            for question, path in [*wanted][: self.batch_size]:
                together.setdefault(question, []).append(path)
            self._extend(together)

    def close(self) -> None:
        """Give back all pages. A search that goes on opens its question again."""
        for question in [*self._questions]:
            question.is_over = True
            question.session.close()

    def _open(self, asked: Sequence[Asked]) -> list[_Question]:
        opened: dict[int, tuple[Prompt, _Question]] = {}
        for one in asked:
            held = one.memo.get(self)
            if held is None or held.is_over:
                prompt = one.prompt()
                if id(prompt) not in opened:
                    opened[id(prompt)] = prompt, _Question(self.engine, prompt)
                one.memo[self] = opened[id(prompt)][1]
        questions = [one.memo[self] for one in asked]
        self._questions.update(questions)
        for question, one in zip(questions, asked):
            question.known(one.path)  # used now, so that it is not forgotten
        for question in {*questions}:
            question.forget()
        return questions

    def _extend(self, together: dict[_Question, list[Path]]) -> None:
        replies: dict[_Question, Replies] = {}
        try:
            for question, paths in together.items():
                question.session.ask(question.requests(paths, self.verdicts), partial(replies.__setitem__, question))
            self.engine.run_until(lambda: len(replies) == len(together))
        except BaseException:
            for question in together:
                question.is_over = True
            raise
        failed = [reply for reply in replies.values() if isinstance(reply, Exception)]
        for question, reply in replies.items():
            if isinstance(reply, Exception):
                question.is_over = True
            else:
                question.note(together[question], reply)
        if failed:
            raise failed[0]


def _reading(good: float, bad: float) -> Reading:
    """Return the reading of two verdicts' log-probs, in nats."""
    return Reading(0.5 + 0.5 * math.tanh((good - bad) / 2), math.exp(good) + math.exp(bad))  # a sigmoid


def _row(prompt: Prompt, path: Path) -> Prompt:
    """Return ``prompt`` with the tokens of ``path`` behind it. What else belongs to a token is as that of the last."""
    behind = torch.tensor([[token for piece in path for token in piece]])
    row = {}
    for name, tensor in {"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt}.items():
        if _is_per_token(tensor, prompt):
            more = tensor[:, -1:].expand(-1, behind.shape[1], *tensor.shape[2:])
            row[name] = torch.cat([tensor, behind.to(tensor) if name == "input_ids" else more], 1)
        else:
            row[name] = tensor
    return row


def _ends(row: Prompt, path: Path) -> list[int]:
    """Return the place of the last token of every step."""
    end = row["input_ids"].shape[1]
    ends = []
    for piece in reversed(path):
        ends.append(end - 1)
        end -= len(piece)
    return ends[::-1]


def _is_per_token(tensor: torch.Tensor, row: Prompt) -> bool:
    return tensor.shape[:2] == row["input_ids"].shape


def _image_shapes(row: Prompt) -> list[tuple[Any, ...]]:
    """Return what rows must have in common to be stacked."""
    return sorted((name, *tensor.shape[1:]) for name, tensor in row.items() if not _is_per_token(tensor, row))
