"""The KV canary: a debug check that every page a branch reads holds what was computed for that branch."""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch

from llava_cot.engine.batch import Batch, Trail
from llava_cot.engine.branch import Branch

_Number = TypeVar("_Number", int, torch.Tensor)


class CanaryError(RuntimeError):
    """A slot that a branch reads does not hold what was computed for the branch.

    Attributes:
        branch: its id in its session.
        prompt: the number of its session's prompt, counted from 0 in the order of their prefills.
        token: the index of the first wrong token in the prompt and the branch's path.
        page, offset: the slot that the page table has for that token.
        expected, found: the word of the token and that of the slot; an unwritten slot has 0.
    """

    def __init__(self, branch: int, prompt: int, token: int, page: int, offset: int, expected: int, found: int) -> None:
        super().__init__(branch, prompt, token, page, offset, expected, found)  # which copying and pickling need
        self.branch, self.prompt, self.token = branch, prompt, token
        self.page, self.offset, self.expected, self.found = page, offset, expected, found

    def __str__(self) -> str:
        return (
            f"page {self.page} must have at offset {self.offset} what was computed for token {self.token} of branch "
            f"{self.branch} of prompt {self.prompt}, the word {self.expected:#x}, but has {self.found:#x}: a page "
            "table, a slot mapping or a copy of a page is wrong, which is a bug of the engine"
        )


class Read(NamedTuple):
    """A row of a pass: ``branch`` has ``length`` tokens in the pages, behind which the row computes those of ``new``.

    Where a branch has several rows, other rows of the pass compute the first ``ahead`` of them.
    """

    branch: Branch
    length: int
    new: Sequence[int] = ()
    ahead: int = 0


def _term(token: _Number, index: _Number) -> _Number:
    """A hash of both in [0, 2**40): the same for integers and for int64 tensors, whose products wrap around."""
    mixed = token * 0x1E3779B97F4A7C15 + index * 0x3F58476D1CE4E5B9 & 0x7FFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 32) * 0x14D049BB133111EB & 0x7FFFFFFFFFFFFFFF
    return mixed >> 23


class Canary:
    """Shadow words beside the keys and values of every slot.

        word[i] = word[i - 1] + term(token[i], i), where word[-1] is the prompt's own

    So a word stands for a prompt and all tokens up to its own, and candidates read those of the ancestors whose pages
    they share. A slot has a word and its term. They are written with the slot mapping that keys and values are stored
    with. They lie in ``cache``, which has the shape of a KV cache of one layer, so that ``copy_pages`` copies them with
    the same pairs of pages.

    A pass writes the words of its tokens. Then it compares what it reads: each word must be the one before it plus its
    own term, and the last one must be the word that the host and the tokens of the pass give, whatever the pages say.
    A wrong slot goes unnoticed with a probability of 2**-40.
    """

    def __init__(self, num_pages: int, page_size: int, device: torch.device) -> None:
        # Words and terms, each as two float32. The last page is no branch's: slot -1, which is nowhere, is its last.
        self.cache = torch.zeros(2, 1, num_pages + 1, page_size, 1, 2, dtype=torch.float32, device=device)
        self._pages = self.cache.view(torch.int64).view(2, num_pages + 1, page_size)
        self._slots = self._pages.view(2, -1).T
        self._page_size = page_size
        self._numbers = count()
        self._prompts = WeakKeyDictionary[Branch, tuple[int, list[int]]]()  # by root: its number and its words
        self._words = WeakKeyDictionary[Branch, list[int]]()  # of the own tokens of a branch, as far as they were read

    def prompt(self, root: Branch, token_ids: torch.Tensor) -> torch.Tensor:
        """The words and terms of a prompt [T]: int64 [T, 2] on the CPU, the same when it is prefilled again."""
        token_ids = token_ids.cpu()
        terms = _term(token_ids, torch.arange(len(token_ids)))
        number = self._prompts[root][0] if root in self._prompts else next(self._numbers)
        words = terms.cumsum(0) + (_term(number, -1) << 20)
        self._prompts[root] = number, words.tolist()
        return torch.stack([words, terms], 1)

    def write(self, words: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write the words and terms of T tokens, int64 [T, 2], into their slots [T]; -1 is nowhere."""
        self._slots[slot_mapping] = words

    def trail(self, reads: Sequence[Read]) -> Trail:
        """What the canary needs in a pass that goes on from ``reads``."""
        words = []
        for branch, length, new, ahead in reads:
            word = self._word(branch, length)
            for index, token in enumerate(new[:ahead], length):
                word += _term(token, index)
            words.append(word)
        return Trail.behind(torch.tensor(words, device=self.cache.device))

    @torch.inference_mode()
    def follow(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Write the words of a pass's tokens [T] and compare all that it reads, without waiting for the host.

        ``batch.trail`` has the outcome, and the words that the next pass goes on from.
        """
        trail, cu_seqlens = batch.trail, batch.cu_seqlens_q
        assert trail is not None and batch.page_table is not None and batch.seq_lens is not None
        seq_lens = batch.seq_lens.long()
        if batch.is_step:
            terms = _term(token_ids, seq_lens - 1)
            words = last = trail.words + terms
        else:
            assert cu_seqlens is not None
            arange = torch.arange(len(token_ids), device=token_ids.device)
            row = torch.repeat_interleave(arange[: len(seq_lens)], cu_seqlens.diff(), output_size=len(token_ids))
            terms = _term(token_ids, arange + (seq_lens - cu_seqlens[1:])[row])
            sums = terms.cumsum(0)
            words = sums + (trail.words - (sums - terms)[cu_seqlens[:-1]])[row]
            last = words[cu_seqlens[1:] - 1]
        self.write(torch.stack([words, terms], 1), batch.slot_mapping)
        trail.words.copy_(last)
        trail.is_broken.logical_or_(self._is_broken(batch.page_table, seq_lens, last))

    def _is_broken(self, page_table: torch.Tensor, seq_lens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Bool [B]: whether the words of each sequence are no chain that ends with ``last`` [B]."""
        words, terms = self._pages.index_select(1, page_table.flatten()).view(2, len(seq_lens), -1)
        index = torch.arange(words.shape[1], device=words.device)
        is_wrong = (words.diff() != terms[:, 1:]).logical_and_(index[1:] < seq_lens.unsqueeze(1))
        ends = words.gather(1, (seq_lens - 1).clamp_(min=0).unsqueeze(1)).squeeze(1)
        return is_wrong.any(1).logical_or_((ends != last).logical_and_(seq_lens > 0))

    def look(self, reads: Sequence[Read], page_table: torch.Tensor, trail: Trail) -> None:
        """Wait for a pass of ``reads``, and raise if one of them has read a wrong word.

        Raises:
            CanaryError: for the first of them.
        """
        if trail.is_broken.any():
            row = trail.is_broken.tolist().index(True)
            raise self._error(reads[row], page_table[row])

    def find(self, reads: Sequence[Read], page_table: torch.Tensor) -> dict[Branch, CanaryError]:
        """The errors of the branches that a pass of ``reads`` without new tokens would read wrong words for."""
        last = self.trail(reads).words
        seq_lens = torch.tensor([read.length for read in reads], device=last.device)
        is_broken = self._is_broken(page_table, seq_lens, last)
        if not is_broken.any():
            return {}
        rows = is_broken.nonzero().squeeze(1).tolist()
        return {reads[row].branch: self._error(reads[row], page_table[row]) for row in rows}

    def _word(self, branch: Branch, length: int) -> int:
        """The word after the first ``length`` tokens of a path, which are not taken back any more."""
        while branch.parent is not None and length <= branch.parent.length:
            branch = branch.parent
        if branch.parent is None:
            return self._prompts[branch][1][length - 1]
        words, first = self._words.setdefault(branch, []), branch.parent.length
        for index in range(first + len(words), length):
            before = words[-1] if words else self._word(branch.parent, first)
            words.append(before + _term(branch.tokens[index - first], index))
        return words[length - first - 1]

    def _error(self, read: Read, pages: torch.Tensor) -> CanaryError:
        branch, length, new, _ = read
        root = branch
        while root.parent is not None:
            root = root.parent
        number, prompt = self._prompts[root]
        expected = [*prompt]
        for token in (*branch.path()[: length - len(prompt)], *new):
            expected.append(expected[-1] + _term(token, len(expected)))
        found = self._pages[0, pages.long()].flatten().tolist()
        differ = (index for index, pair in enumerate(zip(expected, found)) if pair[0] != pair[1])
        at = next(differ, len(expected) - 1)
        page, offset = int(pages[at // self._page_size]), at % self._page_size
        return CanaryError(branch.id, number, at, page, offset, expected[at], found[at])
