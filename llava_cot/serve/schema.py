"""The requests that the server takes. An unknown key is an error that names it, at every level."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Effort = Literal["none", "low", "medium", "high"]


class Part(BaseModel):
    """A part of a request. Numbers are not taken from strings, and no key is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Part):
    type: Literal["text"]
    text: str


class ImageUrl(Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the model's own processor decides on the resolution


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None
    # What an earlier reply had beside its content. It is not shown to the model again.
    reasoning: str | None = None
    reasoning_content: str | None = None
    # The openai package dumps these with an earlier reply, where they are null.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Part):
    include_usage: bool = False


class Extension(Part):
    """The ``llava_cot`` object of a request."""

    search: str | None = None
    settings: dict[str, JsonValue] = {}
    scorer: str | None = None
    budget: dict[str, float | int] = {}
    trace: Literal["none", "summary", "full", "html"] = "summary"
    output: Literal["conclusion", "raw"] = "conclusion"
    prefix_token_ids: list[int] | None = None
    seeds: list[int] | None = None


class Request(Part):
    """What the chat and the responses API have in common."""

    model: str
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None  # nothing is stored
    llava_cot: Extension = Extension()


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    n: int = 1
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    stop: Stop | list[Stop] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None  # a search keeps the log-probs of what it drew, and no others
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None


class InputText(Part):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None  # of an earlier reply
    logprobs: list[Any] | None = None


class InputImage(Part):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputMessage(Part):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]
    id: str | None = None
    status: str | None = None
    phase: None = None  # the openai package dumps it with an earlier reply


class InputReasoning(Part):
    """The reasoning of an earlier reply, which is not shown to the model again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = []
    content: list[Any] | None = None
    encrypted_content: None = None
    status: str | None = None


class Reasoning(Part):
    effort: Effort | None = None


class ResponsesRequest(Request):
    """``POST /v1/responses``."""

    input: str | list[InputMessage | InputReasoning]
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None


class Predicate(Part):
    type: Literal["predicate"]
    instructions: str
    name: str | None = None


class Option(Part):
    value: str | bool
    description: str | None = None


class Choice(Part):
    type: Literal["choice"]
    instructions: str
    choices: list[Option] = Field(min_length=2, max_length=26)
    name: str | None = None


class Level(Part):
    label: str
    description: str | None = None


class Score(Part):
    type: Literal["score"]
    instructions: str
    levels: list[Level] = Field(min_length=2, max_length=10)
    name: str | None = None


class DecisionsRequest(Part):
    """``POST /v1/decisions``."""

    model: str
    input: str | list[InputMessage]
    questions: list[Annotated[Predicate | Choice | Score, Field(discriminator="type")]] = Field(min_length=1)
    safety_identifier: str | None = None
