"""The tag automaton: on the host, in the reference and inside the compiled sampler, against a search in plain bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_cot_kernels.reference import stage_tags as reference
from llava_cot_kernels.sampling import sample
from llava_cot_kernels.stage_tags import StageTags


def search(tags: tuple[bytes, ...], text: bytes, token: bytes) -> tuple[int, int]:
    """(tag, overhang) by looking at every end inside ``token``: the first, and at one end the longest tag."""
    text += token
    for end in range(len(text) - len(token) + 1, len(text) + 1):
        closing = [tag for tag in tags if text.rfind(tag, 0, end) == end - len(tag) >= 0]
        if closing:
            return tags.index(max(closing, key=len)), len(text) - end
    return -1, 0


def sampled(tags: StageTags, state: int, token: int, backend: str) -> tuple[int, int, int]:
    """One step of the sampler, forced to draw ``token``."""
    logits = torch.full((1, tags.num_tokens), -torch.inf)
    logits[0, token] = 0.0
    out = sample(logits, seed=1, position=0, tags=tags, tag_state=state, backend=backend)
    assert out.token.item() == token
    return int(out.tag_state), int(out.tag), int(out.overhang)


def check_walk(tags: StageTags, tokens: list[bytes], walk: list[int]) -> None:
    text, state = b"", tags.start_state
    for token in walk:
        step = tags.advance(state, token)
        assert step[1:] == search(tags.tags, text, tokens[token])
        assert sampled(tags, state, token, "native") == step
        assert sampled(tags, state, token, "reference") == step
        text += tokens[token]
        state = step[0]


CASES = {
    "split over tokens": ([b"</SUM"], [b"<", b"/", b"SU", b"M"], [0, 1, 2, 3, 0, 1, 2, 3]),
    "overhang": ([b"</A>"], [b"x</A", b">\n\n", b"y"], [0, 1, 2]),
    "two tags in one token": ([b"</A>", b"</B>"], [b"</B></A>!"], [0, 0]),
    "inside one token": ([b"</A>"], [b"one</A>two"], [0]),
    "empty token in the middle": ([b"</A>"], [b"</", b"", b"A>"], [0, 1, 1, 2, 1]),
    "prefix of another": ([b"</SUM", b"</SUMMARY>"], [b"</SU", b"M", b"MARY>"], [0, 1, 2]),
    "suffix of another": ([b"A>", b"</A>"], [b"</", b"A>", b"A>"], [0, 1, 2]),
    "false start": ([b"aab"], [b"a", b"aa", b"b"], [0, 0, 1, 2]),
    "overhang opens the next": ([b"</A>"], [b"</A></", b"A>"], [0, 1]),
    "not ASCII": (["é>"], [b"\xc3", b"\xa9", b">"], [0, 1, 2]),
    "no tags": ([], [b"</A>"], [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    tags, tokens, walk = CASES[name]
    check_walk(StageTags(tokens, tags), tokens, walk)


def test_overhang_and_the_state_after_it():
    tags = StageTags([b"</A></", b"A>!"], [b"</A>"])
    state, tag, overhang = tags.advance(tags.start_state, 0)
    assert (tag, overhang) == (0, 2)
    assert tags.advance(state, 1)[1:] == (0, 1)


def test_an_empty_token_at_the_end_of_a_tag_reports_nothing():
    tags = StageTags([b"</A>", b""], [b"</A>"])
    closed = tags.advance(0, 0)[0]
    assert tags.ends[closed] == 0
    assert tags.advance(closed, 1) == (closed, -1, 0)
    assert sampled(tags, closed, 1, "native") == sampled(tags, closed, 1, "reference") == (closed, -1, 0)


short_bytes = st.text("ab<", max_size=5).map(str.encode)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(short_bytes.filter(len), min_size=1, max_size=4, unique=True),
    st.lists(short_bytes, min_size=1, max_size=6),
    st.data(),
)
def test_random_bytes(tag_list, tokens, data):
    walk = data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=12))
    check_walk(StageTags(tokens, tag_list), tokens, walk)


@pytest.mark.parametrize("seed", range(3))
def test_reference_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [bytes(torch.randint(97, 99, (n % 7,), generator=generator).tolist()) for n in range(40)]
    tags = StageTags(tokens, [b"ab", b"abba", b"bbb"])
    state = torch.randint(tags.num_states, (50,), generator=generator, dtype=torch.int32)
    token = torch.randint(-1, 45, (50,), generator=generator)  # -1 is idle, 40 and above pad the vocabulary
    before = state.clone()
    steps = torch.stack(reference.advance(tags, state, token), 1).tolist()
    expected = [tags.advance(s, t) if t >= 0 else (s, -1, 0) for s, t in zip(state.tolist(), token.tolist())]
    assert [tuple(step) for step in steps] == expected
    assert torch.equal(state, before)


def test_tensors():
    tags = StageTags([b"ab", b"", b"\xff"], ["<A>", b"</A>"])
    assert tags.start_state == 0
    assert tags.num_tokens == 3
    assert tags.num_states == 1 + 3 + 3  # the root, <A>, and /A> after the shared <
    assert tags.table.dtype == tags.ends.dtype == torch.int32
    assert tags.table.shape == (7, 256)
    assert tags.token_bytes.tolist() == [97, 98, 255]
    assert tags.token_bytes.dtype == torch.uint8
    assert tags.token_offsets.tolist() == [0, 2, 2, 3]
    assert tags.token_offsets.dtype == torch.int64
    moved = tags.to("meta")
    assert moved.table.device.type == "meta"
    assert tags.table.device.type == "cpu"
    assert moved.advance(0, 0) == tags.advance(0, 0)


def test_errors():
    with pytest.raises(ValueError, match="tags must not be empty byte strings, got one at index 1"):
        StageTags([b"a"], ["<A>", ""])
    with pytest.raises(ValueError, match="tags must be distinct, got b'<A>' twice"):
        StageTags([b"a"], ["<A>", b"<A>"])
    tags = StageTags([b"a"], ["<A>"])
    with pytest.raises(ValueError, match=r"state must be in \[0, num_states=4\), got 4"):
        tags.advance(4, 0)
    with pytest.raises(ValueError, match="token must be >= 0, got -1"):
        tags.advance(0, -1)
    with pytest.raises(TypeError, match="tokenizer must be a Hugging Face fast tokenizer, got str"):
        StageTags.from_tokenizer("gpt2", ["<A>"])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"must have a byte-level or SentencePiece-style decoder, got \['none'\]"):
        StageTags.from_tokenizer(words, ["<A>"])


TEXT = "<SUMMARY> Three cubes: 3, é, 象, 🧊 and\ttabs. </SUMMARY>\n\n<CAPTION>"


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_tokens(["</THINK>é"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(TEXT) - set(" \n\t🧊象é"))]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("build", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_from_tokenizer(build):
    tokenizer = build()
    tags = StageTags.from_tokenizer(tokenizer, ["</SUMMARY>"])
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(tokens) > 3
    text, state, closed = b"", tags.start_state, []
    for token in tokens:
        start, end = tags.token_offsets[token : token + 2].tolist()
        text += bytes(tags.token_bytes[start:end].tolist())
        state, tag, overhang = tags.advance(state, token)
        if tag >= 0:
            closed.append(text[: len(text) - overhang])
    assert text == TEXT.encode()
    assert closed == [TEXT[: TEXT.index("\n\n")].encode()]
    assert tags.num_tokens == len(tokenizer)
    special = tokenizer.bos_token_id
    assert tags.token_offsets[special] == tags.token_offsets[special + 1]


def test_an_added_token_that_is_not_special_has_its_own_bytes():
    tokenizer = byte_level_tokenizer()
    tags = StageTags.from_tokenizer(tokenizer, ["</THINK>"])
    assert tags.advance(0, tokenizer.convert_tokens_to_ids("</THINK>é"))[1:] == (0, 2)
