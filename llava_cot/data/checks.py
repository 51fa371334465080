"""Check whether a line in LLaVA-CoT-100k's layout can be trained on. data/images.py checks its image files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from llava_cot.data.conversations import Conversation, parse_conversation
from llava_cot.data.defect import Defect
from llava_cot.data.images import ImageChecks
from llava_cot.data.rows import parse_row
from llava_cot.literal import MARK, SPECIAL_TOKEN
from llava_cot.stages import LLAVA_COT, Outcome

UNKNOWN, FOLDER, TEXT_ONLY = "(unknown)", "(the folder itself)", "(no image)"  # sources that are not a folder
LEAK = re.compile(r"\bstandard answers?\b", re.IGNORECASE)  # the annotation prompt's name for the answer it was given
# Images come before the first question. A placeholder would be read as text, or as one image too many.
PLACEHOLDER = re.compile(r"<image(?:_\d+)?>", re.IGNORECASE)
FIELDS = {"row": "not an object", "id": "bad id", "image": "bad image field", "conversations": "wrong turns"}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a line: its source, and its defect or the id of the row to keep."""

    source: str = UNKNOWN
    id: str = ""
    defect: Defect | None = None
    warnings: tuple[str, ...] = ()  # kinds of noteworthy things in a row that is kept


@dataclass(frozen=True)
class LineChecks:
    """Judges lines. It checks the JSON, fields and turns, the grammar of every answer, and then the images."""

    images: ImageChecks
    allow_text_only: bool = False

    def __call__(self, line: bytes) -> Verdict:
        source = UNKNOWN
        try:
            row = _read(line)
            source = source_of(row)
            conversation = _parse(row)
            _check_text(conversation)
            if not conversation.images and not self.allow_text_only:
                raise Defect("no image", "image must be a path, got none")
            modes = [self.images.check(path) for path in conversation.images]
        except Defect as defect:
            return Verdict(source, defect=defect)
        warnings = {f"image mode {mode}" for mode in modes if mode not in ("RGB", "L", None)}
        if any(LEAK.search(turn.answer) for turn in conversation.turns):
            warnings.add("mentions a standard answer")
        return Verdict(source, conversation.id, warnings=tuple(sorted(warnings)))


def source_of(row: Any) -> str:
    """Return the first folder in the path of the (first) image, which is the source in LLaVA-CoT-100k's layout."""
    if not isinstance(row, Mapping):
        return UNKNOWN
    image = row.get("image")
    if isinstance(image, list):
        image = image[0] if image else None
    if not isinstance(image, str):
        return TEXT_ONLY if image is None else UNKNOWN
    parts = PurePosixPath(image).parts
    if len(parts) < 2:
        return FOLDER
    return parts[0][:60] if parts[0].isprintable() else ascii(parts[0][:60])


def _read(line: bytes) -> Any:
    try:
        return parse_row(line)
    except UnicodeDecodeError as error:
        raise Defect("not UTF-8", f"byte {error.start} of the line is {line[error.start]:#04x}") from None
    except ValueError as error:
        raise Defect("not JSON", str(error)) from None


def _parse(row: Any) -> Conversation:
    try:
        return parse_conversation(row)
    except ValueError as error:
        message = str(error)
        raise Defect(FIELDS[re.match(r"\w+", message)[0]], _short(message)) from None  # type: ignore[index]


def _check_text(conversation: Conversation) -> None:
    spoken = (text for turn in conversation.turns for text in (turn.question, turn.answer))
    for text in (conversation.id, *conversation.images, *spoken):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # json accepts half of a surrogate pair, a tokenizer does not
            raise Defect("not Unicode", f"{_short(repr(text))} has half a character, {text[error.start]!a}") from None
        if MARK in text:
            raise Defect("not Unicode", f"{_short(repr(text))} has the noncharacter {MARK!a}")
    for index, turn in enumerate(conversation.turns):
        question, answer = f"conversations[{2 * index}]", f"conversations[{2 * index + 1}]"
        if found := PLACEHOLDER.search(turn.question):
            raise Defect("image placeholder", f"{question} has {found[0]}, images stand before the first question")
        if found := SPECIAL_TOKEN.search(turn.answer):  # in a question it is text, as when the model is asked
            raise Defect("special token", f"{answer} has {_short(found[0])}")
        check_stages(turn.answer, answer)


def check_stages(answer: str, where: str) -> None:
    """Check that ``answer`` is the four stages, each once, in order and not empty, and nothing else.

    Raises:
        Defect: it is not; the message says where.
    """
    stages, violation = LLAVA_COT.parse(answer), LLAVA_COT.violation(answer)
    if violation:
        outcomes = {stage.outcome for stage in stages.values()}
        kinds = {
            Outcome.REPEATED: "repeated stage",
            Outcome.UNCLOSED: "unclosed stage",
            Outcome.MISSING: "missing stage",
        }
        kind = next((kind for outcome, kind in kinds.items() if outcome in outcomes), "misplaced tag")
        raise Defect(kind, f"{where}: {violation}")
    for name in reversed(LLAVA_COT.names):
        if not stages[name].text:
            raise Defect(f"empty {name.lower()}", f"{where} has nothing between its tags")
    if found := text_outside(answer):
        raise Defect("text outside of stages", f"{where} has {_short(repr(found))}")


def text_outside(answer: str) -> str:
    """Return the text outside of the stages of an answer that follows the grammar, with single spaces."""
    rest, outside = answer, []
    for name in LLAVA_COT.names:
        open_tag, close_tag = LLAVA_COT.tag_pair(name)
        before, _, rest = rest.partition(open_tag)
        _, _, rest = rest.partition(close_tag)
        outside.append(before)
    return " ".join(" ".join([*outside, rest]).split())


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
