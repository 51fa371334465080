"""The public functions inside torch.compile: one graph, and the results of eager."""

import pytest
import torch

from llava_cot_kernels import StageTags, copy_pages, paged_attention, sample, shared_attention, store_kv


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode_step(hidden, weight, kv_cache, page_table, seq_lens, slots, copies, image, seed, position, tags, tag_state):
    """A layer and the head of a decode step: every op that a step runs."""
    copy_pages(kv_cache, copies)
    key, value = hidden[:, :16].view(-1, 2, 8), hidden[:, 16:32].view(-1, 2, 8)
    store_kv(key, value, kv_cache[0, 0], kv_cache[1, 0], slots)
    query = hidden.view(-1, 4, 8)
    text = paged_attention(query, kv_cache[0, 0], kv_cache[1, 0], page_table, seq_lens, softmax_scale=0.35)
    group, cu_seqlens_k = torch.zeros_like(seq_lens), torch.tensor([0, image.shape[0]])
    seen = shared_attention(query, image, image, group, cu_seqlens_k, softmax_scale=0.35)
    logits = (text + seen).flatten(1) @ weight
    return sample(
        logits, temperature=0.7, top_p=0.9, seed=seed, position=position, tags=tags, tag_state=tag_state, top_k=7
    )


def arguments():
    g = torch.Generator().manual_seed(0)
    tags = StageTags([b"<", b"A>", b"x", *[b"y"] * 20], ["<A>"])
    return {
        "hidden": torch.randn(3, 32, generator=g),
        "weight": torch.randn(32, 23, generator=g),
        "kv_cache": torch.randn(2, 1, 8, 4, 2, 8, generator=g),
        "page_table": torch.tensor([[0, 1], [0, 2], [3, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([6, 7, 2], dtype=torch.int32),
        "slots": torch.tensor([5, 10, 13]),
        "copies": torch.tensor([[1, 4]], dtype=torch.int32),
        "image": torch.randn(11, 2, 8, generator=g),
        "seed": torch.tensor([1, 2, 3]),
        "position": torch.tensor([5, 6, 1]),
        "tags": tags,
        "tag_state": torch.tensor([0, 1, 0], dtype=torch.int32),
    }


def test_a_decode_step_has_no_graph_break():
    explanation = torch._dynamo.explain(decode_step)(**arguments())
    assert explanation.graph_break_count == 0, explanation.break_reasons
    assert explanation.graph_count == 1


def test_a_compiled_decode_step_equals_eager():
    expected = decode_step(**arguments())
    compiled = torch.compile(decode_step, fullgraph=True)
    for _ in range(2):
        given = arguments()
        actual = compiled(**given)
        assert torch.equal(actual.token, expected.token)
        for got, right in zip(actual, expected):
            torch.testing.assert_close(got, right)
        eager = arguments()
        decode_step(**eager)
        assert torch.equal(given["kv_cache"], eager["kv_cache"])


def test_a_bad_row_is_a_status_inside_a_graph():
    compiled = torch.compile(lambda logits: sample(logits, seed=1, position=0), fullgraph=True, backend="aot_eager")
    out = compiled(torch.tensor([[0.0, torch.nan], [0.0, 1.0]]))
    assert out.status.tolist() == [1, 0]
    assert out.token[0] == -1


def test_a_bad_argument_is_still_an_error_inside_a_graph():
    compiled = torch.compile(lambda logits: sample(logits, seed=1, position=0, top_p=2.0), backend="aot_eager")
    with pytest.raises(Exception, match=r"top_p must be in \(0, 1\], got 2.0"):
        compiled(torch.zeros(1, 3))
