"""Replies in the formats that vLLM and SGLang document."""

import json

import pytest

from llava_cot.backends.openai.wire import Kind, Prefix, options_of, read_reply
from llava_cot.core import SamplingParams

STOPS = ("</SUMMARY>", ". ")


def body(content, reason="stop", **choice):
    found = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason, **choice}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}
    return json.dumps({"choices": [found], "usage": usage}).encode()


@pytest.mark.parametrize(
    "sent, text, stop, is_cut",
    [
        (body("a </SUMMARY>", stop_reason="</SUMMARY>"), "a </SUMMARY>", "</SUMMARY>", False),  # vLLM
        (body("a </SUMMARY>", matched_stop="</SUMMARY>"), "a </SUMMARY>", "</SUMMARY>", False),  # SGLang, not trimmed
        (
            body("a </SUMMARY>\n\n<", matched_stop="</SUMMARY>"),
            "a </SUMMARY>",
            "</SUMMARY>",
            False,
        ),  # to the token's end
        (body("a ", matched_stop="</SUMMARY>"), "a </SUMMARY>", "</SUMMARY>", False),  # trimmed, but named
        (body("a", stop_reason=None), "a", None, False),  # EOS
        (body("a", stop_reason=128009), "a", None, False),  # EOS, by its token
        (body("a", reason="length"), "a", None, True),
    ],
)
def test_what_ended_a_reply(sent, text, stop, is_cut):
    reply = read_reply(sent, STOPS, 1)
    (piece,) = reply.pieces
    assert (piece.text, piece.stop, piece.is_cut, piece.count, piece.tokens) == (text, stop, is_cut, 5, None)
    assert (reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens) == (9, 8, 5)


def test_tokens_and_logprobs():
    listed = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
    (piece,) = read_reply(body("a", token_ids=[5, 6], logprobs={"content": listed}), STOPS, 1).pieces
    assert (piece.tokens, piece.logprobs, piece.count) == ((5, 6), (-0.5,), 2)


@pytest.mark.parametrize(
    "sent", [b"", b"[]", b'{"choices": []}', body(3), body("a", reason="tool_calls"), body("a", token_ids=["x"])]
)
def test_what_is_no_reply(sent):
    assert read_reply(sent, STOPS, 1) is None


def test_a_request_of_a_server_of_another_project():
    params = SamplingParams(temperature=0.5)
    found = options_of(
        Kind.OTHER, "m", [{"role": "user", "content": "?"}], Prefix("a", None), (7,), params, 3, ["</S>"]
    )
    extra = found.pop("extra_body")
    assert found == {
        **{"model": "m", "max_tokens": 3, "temperature": 0.5, "top_p": 1.0, "seed": 7, "stop": ["</S>"]},
        **{"logprobs": True, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]},
    }
    assert extra == {
        **{"top_k": -1, "min_p": 0.0, "include_stop_str_in_output": True, "no_stop_trim": True},
        **{"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True},
    }
