"""The text of tokens: as it arrives, in every part of an answer, and with stage tags that are special tokens."""

import copy
import random

import pytest
from helpers.says import says
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

import llava_cot.generator as generator_module
from llava_cot import STAGES, Budget, Finished, SwiresGenerator
from llava_cot.core import SamplingParams
from llava_cot.data import shapes
from llava_cot.detokenise import Detokeniser
from llava_cot.prompt import build_inputs
from llava_cot.search.events import Candidates, StageFinal, TextDelta
from llava_cot.stages import LLAVA_COT, Grammar, Outcome
from llava_cot.vocabulary import Vocabulary

SAMPLE = shapes.sample(809_000)
CLOSE_TAGS = [stop.text for stop in LLAVA_COT.stops]
WORDS = ["I", "see", "two", "cubes", "象", "é", "left", "So", ":"]


def byte_fallback(decoder):
    """A tokenizer with a piece for each byte, for words with a space before them, and a few more."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(f"▁{word}" for word in WORDS)]
    letters = sorted(set("".join(map(str, STAGES)) + "</>abcdefghijklmnopqrstuvwxyz.ISé"))
    pieces += [letter for letter in letters if letter not in pieces]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SENTENCEPIECE = {
    "as in Llama 2": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "no strip": lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
}


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def sentencepiece(request):
    return byte_fallback(SENTENCEPIECE[request.param]())


@pytest.fixture(scope="module")
def llama():
    return byte_fallback(SENTENCEPIECE["as in Llama 2"]())


def text_of(tokenizer, tokens, visible=()):
    return Detokeniser(Vocabulary(tokenizer, visible).token_bytes).add(tokens)


# --- Text as it arrives ---

TEXTS = ["I see two cubes", " I see", "  two ", "a\nb\n\n c", "🎉🧊 象é", "So:\t🎉", "", " ", "\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_sentencepiece_tokens(sentencepiece, text):
    """It is the text that was read, with the space that the tokenizer puts before it; ``decode`` may strip that one."""
    tokens = sentencepiece(text, add_special_tokens=False).input_ids
    whole = text_of(sentencepiece, tokens)
    decoded = sentencepiece.decode(tokens)
    assert whole in (text, " " + text) and whole in (decoded, " " + decoded)
    stream = Detokeniser(Vocabulary(sentencepiece, ()).token_bytes)
    parts = [stream.add([token]) for token in tokens]
    assert "".join(parts) == whole and not any("\ufffd" in part for part in parts)
    for part in TEXTS[:4]:  # a space within an answer is the answer's, wherever a part of it begins
        more = sentencepiece(part, add_special_tokens=False).input_ids
        assert text_of(sentencepiece, tokens + more) == whole + text_of(sentencepiece, more)


@given(st.lists(st.binary(max_size=3), max_size=6), st.lists(st.integers(0, 7), max_size=20), st.randoms())
def test_random_bytes(token_bytes, tokens, chance):
    """What has been sent never changes, and only an unfinished character is missing from it."""
    data = b"".join(token_bytes[token] for token in tokens if token < len(token_bytes))
    stream, sent = Detokeniser(token_bytes), ""
    while tokens:
        count = chance.randint(1, len(tokens))
        sent += stream.add(tokens[:count])
        tokens = tokens[count:]
    whole = data.decode("utf-8", "replace")
    assert whole in (sent, sent + "\ufffd")


@given(st.text(max_size=12), st.randoms())
def test_any_text_in_bytes(text, chance):
    data = text.encode("utf-8", "ignore")
    cuts = sorted(chance.randint(0, len(data)) for _ in range(4))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]
    stream = Detokeniser(pieces)
    parts = [stream.add([token]) for token in range(len(pieces))]
    assert "".join(parts) == data.decode() and not ("\ufffd" in "".join(parts) and "\ufffd" not in text)


def test_a_byte_level_tokenizer_is_as_transformers_decodes(tiny):
    tokenizer, chance = tiny.processor.tokenizer, random.Random(0)
    for _ in range(200):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(20)]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert tiny.decode(tokens) in (expected, expected.removesuffix("\ufffd"))


# --- Through a search ---

STAGED = "".join(f"{stage.open_tag} I 🎉\n象 {stage.close_tag}" for stage in STAGES)


@pytest.fixture
def speaker(tiny, monkeypatch):
    """A generator with another tokenizer, whose model writes ``tokens``."""

    def make(tokenizer, tokens, grammar=LLAVA_COT):
        inputs = build_inputs(tiny.processor, SAMPLE.image, SAMPLE.question, "one")
        monkeypatch.setattr(generator_module, "build_inputs", lambda *_, **__: inputs)
        processor = copy.copy(tiny.processor)
        processor.tokenizer = tokenizer
        generator = SwiresGenerator(says(tiny.model, tokens), processor, grammar=grammar)
        generator.model.generation_config.eos_token_id = tokens[-1]
        return generator

    return make


def assert_whole(generator, search, text, **settings):
    """All parts of an answer and of its stream add up to ``text``."""
    *events, finished = generator.stream(SAMPLE.image, SAMPLE.question, search, **settings)
    assert isinstance(finished, Finished) and finished.answer.text == text
    nodes = finished.answer.trace.path(finished.answer.trace.data["answer"])
    assert "".join(node["text"] for node in nodes) == text
    assert "".join(event.text for event in events if isinstance(event, StageFinal)) == text
    deltas = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(deltas) == (text if search in ("greedy", "sample") else "")
    for shown in (event for event in events if isinstance(event, Candidates)):
        assert all(candidate.text in text for candidate in shown.candidates if candidate.kept)
    return finished.answer


SEARCHES = {
    **{name: {} for name in ("greedy", "sample", "token_beam")},
    "best_of_n": {"n": 2},
    "sentence_beam": {"candidates": 2},
    "swires": {"candidates": 2, "cutoff": -1.0},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_an_answer_of_llama_tokens(speaker, llama, search):
    tokens = [*llama(STAGED, add_special_tokens=False).input_ids, llama.eos_token_id]
    generator = speaker(llama, tokens)
    answer = assert_whole(generator, search, " " + STAGED, max_new_tokens=len(tokens), **SEARCHES[search])
    assert all(stage.outcome is Outcome.COMPLETE for stage in answer.stages.values())
    assert answer.conclusion == "I 🎉\n象"


def test_a_scorer_sees_the_space_before_a_word(speaker, llama):
    text, seen = "".join(f"{stage.open_tag} so {stage.close_tag}\n two" for stage in STAGES), []
    tokens = [*llama(text, add_special_tokens=False).input_ids, llama.eos_token_id]

    def note(spans):
        seen.extend(span.path_text for span in spans)
        assert all(span.path_text.endswith(span.text) for span in spans)
        return [0.0] * len(spans)

    answer = speaker(llama, tokens).answer(SAMPLE.image, SAMPLE.question, "swires", cutoff=-1.0, scorer=note)
    assert answer.text == seen[-1] == " " + text.removesuffix("\n two")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_character_that_is_cut_within(speaker, llama, cut):
    """Its bytes come in several tokens. A part of an answer may end between two of them, and the next one goes on."""
    tokens = [*llama("🎉🧊", add_special_tokens=False).input_ids, llama.eos_token_id]
    generator = speaker(llama, tokens)
    whole = text_of(llama, tokens)

    def policy(search):
        greedy = SamplingParams(temperature=0.0)
        first = yield from search.expand([search.root], 1, STAGES[0], params=greedy, max_stage_tokens=cut)
        if not search.can_continue(first[0]):
            return first[0]
        return (yield from search.expand(first, 1, None, params=greedy))

    answer = generator.answer(SAMPLE.image, SAMPLE.question, policy, max_new_tokens=len(tokens))
    parts = [node["text"] for node in answer.trace.data["nodes"]]
    assert answer.text == "".join(parts) == whole
    short = generator.answer(SAMPLE.image, SAMPLE.question, "greedy", max_new_tokens=cut)
    assert whole.startswith(short.text) and len(short.tokens) == min(cut, len(tokens))


def test_a_search_that_its_budget_stops_within_a_character(speaker, llama):
    tokens = [*llama("🎉" * 10, add_special_tokens=False).input_ids, llama.eos_token_id]
    generator = speaker(llama, tokens)
    for limit in (5, 6, 7, 8):
        budget = Budget(generated_tokens=limit, reserve=0.5)
        answer = generator.answer(SAMPLE.image, SAMPLE.question, "greedy", budget=budget)
        nodes = answer.trace.path(answer.trace.data["answer"])
        assert "".join(node["text"] for node in nodes) == answer.text and "\ufffd" not in answer.text


# --- Stage tags that are tokens of their own ---


def with_tags(tiny, add):
    tokenizer = copy.deepcopy(tiny.processor.tokenizer)
    add(tokenizer)
    return tokenizer


ADDED = {
    "special": lambda t: t.add_special_tokens({"extra_special_tokens": LLAVA_COT.all_tags}),
    "special, only the closing ones": lambda t: t.add_special_tokens({"extra_special_tokens": CLOSE_TAGS}),
    "special, with white space": lambda t: t.add_special_tokens(
        {"extra_special_tokens": [f" {tag}\n" for tag in LLAVA_COT.all_tags]}
    ),
    "special, a pair of tags in one": lambda t: t.add_special_tokens(
        {"extra_special_tokens": ["</SUMMARY>\n\n<CAPTION>", "</CAPTION> <REASONING>"]}
    ),
    "special, parts of a tag": lambda t: t.add_special_tokens(
        {"extra_special_tokens": ["</CAPTION", "REASONING>", "</"]}
    ),
    "normal": lambda t: t.add_tokens(LLAVA_COT.all_tags),
    "normal, stripped": lambda t: t.add_tokens(
        [AddedToken(tag, lstrip=True, rstrip=True) for tag in LLAVA_COT.all_tags]
    ),
    "normal, across a tag": lambda t: t.add_tokens(["MMARY>\n\n<CAP", "</CAPT", "ON>\n"]),
    "not at all": lambda t: None,
}
TAGGED = "\n\n".join(f"{stage.open_tag} A cat. {stage.close_tag}" for stage in STAGES) + "\n"


@pytest.mark.parametrize("add", ADDED.values(), ids=ADDED)
def test_tags_are_found_and_stay_in_the_text(tiny, add):
    tokenizer = with_tags(tiny, add)
    vocabulary = Vocabulary(tokenizer, LLAVA_COT.all_tags)
    tags = vocabulary.stop_tags(CLOSE_TAGS)
    tokens = [*tokenizer(TAGGED, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    stream, state, found, text = Detokeniser(vocabulary.token_bytes), tags.start_state, [], ""
    for token in tokens:
        state, tag, overhang = tags.advance(state, token)
        text += stream.add([token])
        if tag >= 0:
            found.append(tag)
            assert text[: len(text) - overhang].endswith(CLOSE_TAGS[tag])
    assert found == [0, 1, 2, 3]
    stages = LLAVA_COT.parse(text)
    assert [(stage.text, stage.outcome) for stage in stages.values()] == [("A cat.", Outcome.COMPLETE)] * 4
    assert tokenizer.eos_token not in text and LLAVA_COT.violation(text) is None


@pytest.mark.parametrize("special", ["[PAD]", "[/INST]", "<|image|>", "<pad>", "]["])
def test_a_special_token_that_only_looks_like_a_tag_stays_hidden(tiny, special):
    tokenizer = with_tags(tiny, lambda t: t.add_special_tokens({"extra_special_tokens": [special]}))
    token = tokenizer.convert_tokens_to_ids(special)
    grammar = Grammar({"SAY": []}, tags={"SAY": ("[", "]")})
    shown = text_of(tokenizer, [token], grammar.all_tags)
    assert shown == ("][" if special == "][" else "")  # that one is two tags


RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(4)]
SPOKEN = Grammar.sequence("LOOK", "SAY", tags={"LOOK": RESERVED[:2], "SAY": RESERVED[2:]})


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("ends", [True, False], ids=["then EOS", "the last tag is EOS"])
def test_a_search_of_special_tags(tiny, speaker, search, ends):
    tokenizer = tiny.processor.tokenizer
    text = f"{RESERVED[0]} a cat {RESERVED[1]}{RESERVED[2]} 4 {RESERVED[3]}"
    tokens = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ends
    generator = speaker(tokenizer, tokens, SPOKEN)
    answer = assert_whole(generator, search, text, max_new_tokens=40, **SEARCHES[search])
    assert {name: stage.text for name, stage in answer.stages.items()} == {"LOOK": "a cat", "SAY": "4"}
    assert answer.conclusion == "4" and answer.violation is None
    assert all(node["closed"] for node in answer.trace.path(answer.trace.data["answer"]))
