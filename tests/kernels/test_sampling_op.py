"""The compiled sampling op by itself, and the errors of the public function."""

import math

import pytest
import torch

from llava_cot_kernels.sampling import SampleOutput, sample
from llava_cot_kernels.stage_tags import StageTags


def op_arguments(logits: torch.Tensor, row: list[int], tags: StageTags | None = None) -> list[torch.Tensor | None]:
    """Arguments of ``torch.ops.llava_cot_kernels.sample`` with outputs full of garbage."""
    n = len(row)
    inputs = [torch.tensor(row), *(torch.full((n,), v) for v in (0.8, 5, 0.9, 0.01)), torch.arange(n), torch.arange(n)]
    automaton = [tags.table, tags.ends, tags.token_bytes, tags.token_offsets] if tags else [None] * 4
    ints = [torch.full((n,), v, dtype=torch.int32) for v in (0, -77, -77, -77)]
    return [logits, *inputs, *automaton, torch.full((n,), -77), *torch.full((3, n), torch.nan).unbind(), *ints]


def test_every_output_is_written():
    logits = torch.zeros(3, 50)
    logits[1] = torch.nan
    arguments = op_arguments(logits, [0, 1, -1, 2])
    torch.ops.llava_cot_kernels.sample(*arguments)
    out = SampleOutput(*arguments[12:])
    assert (out.token[[0, 3]] >= 0).all() and out.token[[1, 2]].tolist() == [-1, -1]
    for scores in (out.logprob, out.entropy, out.sampling_logprob):
        assert scores.isfinite().all() and scores[[1, 2]].tolist() == [0, 0]
    assert out.status.tolist() == [0, 1, 0, 0]
    assert out.tag_state.tolist() == out.overhang.tolist() == [0] * 4
    assert out.tag.tolist() == [-1] * 4


def test_the_schema_lists_the_outputs_in_their_public_order():
    names = [argument.name for argument in torch.ops.llava_cot_kernels.sample.default._schema.arguments]
    assert tuple(names[12:]) == SampleOutput._fields


@pytest.mark.parametrize("tagged", [False, True])
def test_opcheck(tagged):
    tags = StageTags([b"<A", b">", b"x"], ["<A>"]) if tagged else None
    torch.library.opcheck(
        torch.ops.llava_cot_kernels.sample.default, tuple(op_arguments(torch.randn(2, 3), [1, 0], tags))
    )


def test_the_op_refuses_what_would_leave_memory():
    tags = StageTags([b"<A>"], ["<A>"])
    op = torch.ops.llava_cot_kernels.sample
    with pytest.raises(RuntimeError, match="row must be below R=2, got 2"):
        op(*op_arguments(torch.zeros(2, 3), [2]))
    arguments = op_arguments(torch.zeros(1, 1), [0], tags)
    arguments[16][0] = 9
    with pytest.raises(RuntimeError, match=r"tag_state must be in \[0, 4\), got 9"):
        op(*arguments)
    arguments = op_arguments(torch.zeros(1, 1), [0], tags)
    arguments[8] = arguments[8] + 4
    with pytest.raises(RuntimeError, match=r"tag_table must hold states in \[0, 4\)"):
        op(*arguments)
    arguments = op_arguments(torch.zeros(1, 1), [0], tags)
    arguments[11] = torch.tensor([0, 99])
    with pytest.raises(RuntimeError, match="token_offsets must ascend inside token_bytes, got 0 and 99"):
        op(*arguments)
    arguments = op_arguments(torch.zeros(1, 1), [0])
    arguments[12] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="token must have size 1 in dimension 0, got 2"):
        op(*arguments)


ERRORS = [
    ({"temperature": -0.5}, ValueError, "temperature must be >= 0 and finite in float32, got -0.5"),
    ({"temperature": math.inf}, ValueError, "temperature must be >= 0 and finite in float32, got inf"),
    ({"temperature": torch.tensor([1.0, math.nan])}, ValueError, "temperature must be >= 0 and .*, got nan"),
    ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\*\*63\), got -1"),
    ({"top_k": 1.5}, TypeError, r"top_k must be an integer or an \[N\] tensor, got float"),
    ({"top_k": torch.ones(2)}, TypeError, "top_k must be int64 or int32, got float32"),
    ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ({"top_p": torch.tensor([0.5, 0.0])}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
    ({"min_p": "0"}, TypeError, r"min_p must be a number or an \[N\] tensor, got str"),
    ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\], got -0.1"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
    ({"seed": 2**63}, ValueError, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "seed must have N=2 in dimension 0, got 3"),
    ({"position": -1}, ValueError, r"position must be in \[0, 2\*\*63\), got -1"),
    ({"row": torch.tensor([0, 2])}, ValueError, r"row must be -1 or in \[0, R=2\), got 2"),
    ({"row": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "row must be int64, got int32"),
    ({"tag_state": 0}, ValueError, "tag_state must be None without tags"),
    ({"backend": "triton"}, ValueError, "backend of sample on cpu must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        sample(torch.zeros(2, 3), **{"seed": 1, "position": 0, **change})


def test_errors_of_logits_and_tags():
    with pytest.raises(ValueError, match=r"logits must have shape \[R, V\], got \[3\]"):
        sample(torch.zeros(3), seed=1, position=0)
    with pytest.raises(ValueError, match=r"logits must have 1 <= V < 2\*\*23, got V=0"):
        sample(torch.zeros(3, 0), seed=1, position=0)
    with pytest.raises(TypeError, match="logits must be float32 or bfloat16 or float16, got float64"):
        sample(torch.zeros(1, 3, dtype=torch.float64), seed=1, position=0)
    tags = StageTags([b"a"], ["<A>"])
    with pytest.raises(ValueError, match=r"tag_state must be in \[0, num_states=4\), got 4"):
        sample(torch.zeros(1, 1), seed=1, position=0, tags=tags, tag_state=4)
    with pytest.raises(ValueError, match=r"tags must be on cpu, got meta; use tags.to\(device\)"):
        sample(torch.zeros(1, 1), seed=1, position=0, tags=tags.to("meta"))
