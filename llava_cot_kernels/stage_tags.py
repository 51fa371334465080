"""Find the byte strings that end a stage in sampled tokens, also where a string spans several tokens."""

import copy
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch


class StageTags:
    """An Aho-Corasick byte automaton over ``tags`` and the bytes of every token.

    One step reads one byte: ``state = table[state, byte]``. ``ends[state]`` is the tag that closes in this state. The
    sampler walks only the bytes of the token that it drew, so a table of size states x vocabulary is never built.

    Args:
        token_bytes: the bytes that each token id adds to the text, in id order; ``b""`` for special tokens. It may be
            longer than the vocabulary of the logits. Ids past its end are empty tokens (padding rows of the head).
        tags: distinct, non-empty byte strings, or text that is encoded as UTF-8. The number of a tag is its index here.

    Attributes: all are tensors on one device, which ``to`` changes.
        table: int32 [num_states, 256], the next state.
        ends: int32 [num_states], the tag that closes on entering the state (the longest if several close), or -1.
        token_bytes: uint8 [total], the bytes of all tokens.
        token_offsets: int64 [num_tokens + 1], where the bytes of each token start.

    Raises:
        ValueError: a tag is empty or occurs twice.
        TypeError: ``tags`` is a single string, a tag is no string, or a token is no byte string.

    Source: Aho and Corasick, "Efficient string matching", 1975.
    """

    start_state = 0

    def __init__(self, token_bytes: Sequence[bytes], tags: Sequence[str | bytes]) -> None:
        if isinstance(tags, str | bytes):
            raise TypeError(f"tags must be a sequence of strings, got {tags!r}")
        self.tags = tuple(tag.encode() if isinstance(tag, str) else _as_bytes("tags", tag) for tag in tags)
        for i, tag in enumerate(self.tags):
            if not tag:
                raise ValueError(f"tags must not be empty byte strings, got one at index {i}")
            if tag in self.tags[:i]:
                raise ValueError(f"tags must be distinct, got {tag!r} twice")
        self._tokens = [_as_bytes("token_bytes", token) for token in token_bytes]
        self._table, self._ends = _build_automaton(self.tags)
        self.max_token_bytes = max(map(len, self._tokens), default=0)
        lengths = torch.tensor([0, *map(len, self._tokens)], dtype=torch.int64)
        self.table = torch.tensor(self._table, dtype=torch.int32)
        self.ends = torch.tensor(self._ends, dtype=torch.int32)
        self.token_bytes = torch.tensor(list(b"".join(self._tokens)), dtype=torch.uint8)
        self.token_offsets = lengths.cumsum(0)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, tags: Sequence[str | bytes]) -> "StageTags":
        """Build the automaton for a Hugging Face fast tokenizer with byte-level BPE or SentencePiece-style pieces.

        Special tokens are empty, since they never reach the text.

        Raises:
            TypeError: the tokenizer is a slow one.
            ValueError: its decoder is neither byte-level nor SentencePiece-style.
        """
        return cls(_vocabulary_bytes(tokenizer), tags)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_states(self) -> int:
        return len(self._ends)

    def to(self, device: torch.device | str) -> "StageTags":
        """Return the same automaton with its tensors on ``device``. The tables on the host are shared."""
        moved = copy.copy(self)
        for name in ("table", "ends", "token_bytes", "token_offsets"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def advance(self, state: int, token: int) -> tuple[int, int, int]:
        """Return ``(state, tag, overhang_bytes)`` after ``token``. The kernels follow this definition.

        ``tag`` is the first tag that closes inside the token, or -1. ``overhang_bytes`` is the number of the token's
        bytes after that tag, or 0; the state includes them. An empty token changes nothing and reports nothing.

        Raises:
            ValueError: ``state`` or ``token`` is out of range.
        """
        if not 0 <= state < self.num_states:
            raise ValueError(f"state must be in [0, num_states={self.num_states}), got {state}")
        if token < 0:
            raise ValueError(f"token must be >= 0, got {token}")
        data = self._tokens[token] if token < self.num_tokens else b""
        closed, overhang = -1, 0
        for i, byte in enumerate(data):
            state = self._table[state][byte]
            if closed < 0 and self._ends[state] >= 0:
                closed, overhang = self._ends[state], len(data) - i - 1
        return state, closed, overhang


def _as_bytes(name: str, value: Any) -> bytes:
    """Convert what is bytes, and not a number: ``bytes(5)`` is five zeros."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{name} must hold byte strings, got {type(value).__name__}")
    return bytes(value)


def _build_automaton(tags: Sequence[bytes]) -> tuple[list[list[int]], list[int]]:
    """Return ``table`` and ``ends``: build the trie of the tags, then fill missing edges breadth first by fallback."""
    table, ends = [[-1] * 256], [-1]
    for i, tag in enumerate(tags):
        state = 0
        for byte in tag:
            if table[state][byte] < 0:
                table[state][byte] = len(table)
                table.append([-1] * 256)
                ends.append(-1)
            state = table[state][byte]
        ends[state] = i
    fallback = [0] * len(table)  # the longest proper suffix of a state that is itself a state
    queue = deque([0])
    while queue:
        state = queue.popleft()
        for byte, child in enumerate(table[state]):
            otherwise = table[fallback[state]][byte] if state else 0
            if child < 0:
                table[state][byte] = otherwise
            else:
                fallback[child] = otherwise
                if ends[child] < 0:
                    ends[child] = ends[otherwise]
                queue.append(child)
    return table, ends


def _vocabulary_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id of a fast tokenizer. Special tokens and unused ids are empty."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"tokenizer must be a Hugging Face fast tokenizer, got {type(tokenizer).__name__}")
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps = decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        piece_bytes = _byte_level_piece
    elif kinds & {"Metaspace", "ByteFallback"} or any(step.get("pattern") == {"String": "▁"} for step in steps):
        piece_bytes = _sentencepiece_piece
    else:
        raise ValueError(f"tokenizer must have a byte-level or SentencePiece-style decoder, got {sorted(kinds)}")
    vocabulary = tokenizer.get_vocab()
    token_bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        token_bytes[token] = piece_bytes(piece)
    for token, added in tokenizer.added_tokens_decoder.items():
        token_bytes[token] = b"" if added.special else added.content.encode()
    for token in tokenizer.all_special_ids:
        token_bytes[token] = b""
    return token_bytes


def _byte_alphabet() -> dict[str, int]:
    """Invert GPT-2's map of bytes to characters: printable Latin-1 is itself, other bytes are U+0100 and above."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _byte_level_piece(piece: str) -> bytes:
    if all(character in _BYTE_OF_CHARACTER for character in piece):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    return piece.encode()  # the tokenizers library decodes a piece outside the alphabet this way


def _sentencepiece_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
