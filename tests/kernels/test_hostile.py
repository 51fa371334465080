"""Hostile arguments of every public op: each is one error that names the argument, or the right result.

``python tests/kernels/test_hostile.py`` runs the whole table, of every op, argument and change to it. A test does that
in a process of its own, so that a crash is a failure that says which case it was.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fibers
from torch.autograd import forward_ad

from llava_cot_kernels import (
    PagePool,
    StageTags,
    copy_pages,
    few_row_linear,
    linear_logprobs,
    paged_attention,
    sample,
    shared_attention,
    store_kv,
    token_logprobs,
)
from llava_cot_kernels.backend import OPS
from llava_cot_kernels.reference import attention as reference

ROOT = Path(__file__).parents[2]
FUNCTIONS = {
    function.__name__: function
    for function in (
        store_kv, copy_pages, paged_attention, shared_attention, few_row_linear, sample, token_logprobs, linear_logprobs
    )
}  # fmt: skip
ON_FIBERS = ("store_kv", "copy_pages", "sample", "token_logprobs")  # the native ops of CUDA; the others are Triton's
DTYPES = [torch.bool, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.complex64, torch.float8_e4m3fn]
NOT_TENSORS = [None, 1, 2.5, "1", [1.0], np.ones(2), torch.float32, object()]
NUMBERS = [-1, 0, 1, True, 0.5, -0.5, 2**31, 2**63, 2**70, 10**400, 1e-320, 1e39, math.nan, math.inf, -math.inf, 1j]
NUMBERS += [None, "1", [1.0], np.ones(2), torch.tensor(1.0), torch.tensor([1.0]), torch.ones(2, 2)]

CACHES = {name: "num_pages page_size Hkv D" for name in ("key_cache", "value_cache")}
AXES = {  # of tensors, by the sizes that they share
    "store_kv": {"key": "T Hkv D", "value": "T Hkv D", **CACHES, "slot_mapping": "T"},
    "copy_pages": {"kv_cache": "_ num_layers num_pages page_size Hkv D", "copies": "m _"},
    "paged_attention": {"query": "T Hq D", **CACHES, "page_table": "B P", "seq_lens": "B", "cu_seqlens_q": "B+1"}
    | {"prefix_group": "B", "prefix_lens": "G"},
    "shared_attention": {"query": "N Hq D", "key": "S Hkv D", "value": "S Hkv D", "group": "N", "cu_seqlens_k": "G+1"},
    "few_row_linear": {"x": "M K", "weight": "N K", "scale": "N", "bias": "N"},
    "sample": {"logits": "R V", "row": "N", "temperature": "N", "top_k": "N", "top_p": "N", "min_p": "N", "seed": "N"}
    | {"position": "N", "tag_state": "N"},
    "token_logprobs": {"logits": "T V", "targets": "T"},
    "linear_logprobs": {"hidden": "T H", "weight": "V H", "targets": "T"},
}
IDLE = {"slot_mapping": -1, "copies": 0, "page_table": 0, "seq_lens": 0, "cu_seqlens_q": 0, "prefix_group": -1}
IDLE |= {"group": -1, "cu_seqlens_k": 0, "row": -1, "targets": -100}


def good(op):
    """Arguments that an op takes, new ones at each call."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    def integers(*values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype)

    return {
        "store_kv": lambda: {
            "key": random(3, 2, 4),
            "value": random(3, 2, 4),
            "key_cache": random(5, 2, 2, 4),
            "value_cache": random(5, 2, 2, 4),
            "slot_mapping": integers(7, -1, 0, dtype=torch.int64),
        },
        "copy_pages": lambda: {"kv_cache": random(2, 3, 5, 2, 2, 4), "copies": integers([0, 3], [4, 1])},
        "paged_attention": lambda: {
            "query": random(3, 4, 4),
            "key_cache": random(5, 2, 2, 4),
            "value_cache": random(5, 2, 2, 4),
            "page_table": integers([0, 1], [0, 3]),
            "seq_lens": integers(3, 4),
            "softmax_scale": 0.5,
            "cu_seqlens_q": integers(0, 1, 3),
            "prefix_group": integers(0, 0),
            "prefix_lens": integers(2, 0),
            "window": 2,
            "return_lse": True,
        },
        "shared_attention": lambda: {
            "query": random(3, 4, 4),
            "key": random(5, 2, 4),
            "value": random(5, 2, 4),
            "group": integers(1, -1, 0),
            "cu_seqlens_k": integers(0, 2, 5),
            "softmax_scale": 0.5,
            "return_lse": True,
        },
        "few_row_linear": lambda: {
            "x": random(2, 4),
            "weight": integers([1, -2, 3, 4], [5, 6, -7, 8], [0, 0, 9, 1], dtype=torch.int8),
            "scale": random(3),
            "bias": random(3),
        },
        "sample": lambda: {
            "logits": random(2, 6),
            "row": integers(0, 1, -1, dtype=torch.int64),
            "temperature": torch.tensor([1.0, 0.0, 0.5]),
            "top_k": integers(0, 2, 3, dtype=torch.int64),
            "top_p": torch.tensor([1.0, 0.5, 0.9]),
            "min_p": torch.tensor([0.0, 0.1, 1.0]),
            "seed": integers(1, 2, 3, dtype=torch.int64),
            "position": integers(0, 5, 7, dtype=torch.int64),
            "tags": StageTags([b"<A", b">", b"x", b""], ["<A>"]),
            "tag_state": integers(0, 2, 1),
        },
        "token_logprobs": lambda: {"logits": random(3, 5), "targets": integers(0, -100, 4, dtype=torch.int64)},
        "linear_logprobs": lambda: {
            "hidden": random(3, 4),
            "weight": random(5, 4),
            "targets": integers(0, -100, 4, dtype=torch.int64),
            "temperature": 0.7,
            "entropy": True,
        },
    }[op]()


def changes(name, value):
    """What an argument may be instead, and what to call it."""
    if name in ("softmax_scale", "temperature", "top_k", "top_p", "min_p", "seed", "position", "tag_state", "window"):
        yield from ((repr(number), number) for number in NUMBERS)
    if name == "tags":
        yield from ((repr(other), other) for other in ("<A>", [b"<A>"], 3))
        yield "on meta", value.to("meta")
    if not isinstance(value, torch.Tensor):
        return
    yield from ((f"a {type(other).__name__}", other) for other in NOT_TENSORS)
    yield from ((f"{dtype}", value.to(dtype)) for dtype in DTYPES if dtype != value.dtype)
    yield "on meta", value.to("meta")
    yield "sparse", value.to_sparse()
    yield "[0]", value[0]
    yield "[None]", value[None]
    yield "no dimension", value.flatten()[0]
    yield "overlapping windows", value.flatten().as_strided(value.shape, [1] * value.dim())
    for axis, size in enumerate(value.shape):
        yield f"size 0 in {axis}", value.narrow(axis, 0, 0)
        yield f"size {size - 1} in {axis}", value.narrow(axis, 0, size - 1)
        yield f"size {2 * size} in {axis}", torch.cat([value, value], axis)
        yield f"expanded in {axis}", value.narrow(axis, 0, 1).expand_as(value)
        yield f"every other in {axis}", torch.cat([value, value], axis).unflatten(axis, (size, 2)).select(axis + 1, 0)
        yield f"transposed in {axis}", value.transpose(axis, -1).contiguous().transpose(axis, -1)
    if value.is_floating_point():
        odd = [math.nan, math.inf, -math.inf, 3e38, 1e-45, -0.0]
        yield "requires grad", value.clone().requires_grad_()
    else:
        info = torch.iinfo(value.dtype)
        odd = [info.min, -101, -2, -1, 1, 2, 4, 5, 9, 99, info.max]
    for number in odd:
        for index in (0, -1):
            changed = value.clone()
            changed.view(-1)[index] = number
            yield f"{number} at {index}", changed


def without(size, axes, arguments, is_idle):
    """Arguments that share a size, with 0 of it. If idle, their indices are those that refer to nothing."""
    changed = dict(arguments)
    for name, words in axes.items():
        if is_idle and name in IDLE:
            changed[name] = torch.full_like(changed[name], IDLE[name])
        for axis, word in enumerate(words.split()):
            if word.removesuffix("+1") == size:
                changed[name] = changed[name].narrow(axis, 0, int(word.endswith("+1")))
    return changed


def cases(op):
    """Every case of an op: what it is, and the arguments."""
    for name, value in good(op).items():
        for changed, other in changes(name, value):
            yield f"{name}: {changed}", good(op) | {name: other}
    for size in dict.fromkeys(" ".join(AXES[op].values()).replace("+1", "").split()):
        for is_idle in (False, True):
            yield f"no {size}, {is_idle=}", without(size, AXES[op], good(op), is_idle)
    yield "all on meta", {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in good(op).items()}


def outcome(function, arguments, backend):
    """The error, or every tensor that was returned or written."""
    try:
        result = function(**arguments, backend=backend)
    except (ValueError, TypeError) as error:
        return error
    except Exception as error:  # a fault
        return f"{type(error).__name__}: {error}"
    written = [value for name, value in arguments.items() if name.endswith("cache")]
    return written if result is None else [result] if torch.is_tensor(result) else list(result)


def fault(op, names, outcomes, needs_gradient):
    """Say what is wrong with the outcomes of one case by back end, or return None."""
    names = [*names, f"tensors of {op}", "tags"]
    right = outcomes["reference"]
    for backend, found in outcomes.items():
        if isinstance(found, str):
            return f"{backend} raises {found}"
        if isinstance(found, Exception) and not re.fullmatch(rf"({'|'.join(names)})\b.* must .*", str(found)):
            return f"{backend} names no argument: {found}"
        if needs_gradient and backend != "reference" and not op.endswith("logprobs"):
            if not isinstance(found, ValueError):
                return f"{backend} loses the gradient"
        elif isinstance(found, Exception) or isinstance(right, Exception):
            if str(found) != str(right):
                return f"{backend} gives {found}, the reference {right}"
        elif any(not close(got, expected) for got, expected in zip(found, right, strict=True)):
            return f"{backend} gives {found}, the reference {right}"
    return None


def close(got, expected):
    return torch.allclose(got.float(), expected.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


def main():
    torch.set_num_threads(1)
    native = OPS["native"]
    for op, function in FUNCTIONS.items():
        backends = {"native": native, "reference": native} | ({"fibers": fibers.ops()} if op in ON_FIBERS else {})
        # Each back end has arguments of its own, to write into.
        for same in zip(*(cases(op) for _ in backends)):
            case = same[0][0]
            print(f"{op}, {case}", flush=True)
            outcomes = {}
            for (backend, OPS["native"]), (_, arguments) in zip(backends.items(), same):
                outcomes[backend] = outcome(function, arguments, "reference" if backend == "reference" else "native")
            if found := fault(op, arguments, outcomes, case.endswith("requires grad")):
                print(f"FAULT {op}, {case}: {found}", flush=True)


def test_each_hostile_argument_is_an_error_or_the_right_result():
    """The table, in a process of its own. Its last line is the case that it died of."""
    command = [sys.executable, "-X", "faulthandler", __file__]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}\n{done.stderr[-4000:]}"
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert len(lines) > 2000


# ---- gradients ----


def along(transform, function, tensor):
    """The derivative of the sum of what a function makes of a tensor."""
    if transform == "backward":
        function(tensor.requires_grad_()).sum().backward()
        return tensor.grad
    if transform == "torch.compile":
        torch._dynamo.reset()
        return along("backward", torch.compile(function, backend="aot_eager"), tensor)
    if transform == "torch.func.jvp":
        return torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))[1]
    if transform == "forward mode without gradients":
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))).tangent
    return torch.func.grad(lambda x: function(x).sum())(tensor)


TRANSFORMS = ["torch.func.grad", "torch.func.jvp", "forward mode without gradients", "torch.compile"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("paged_attention", "query"),
        ("shared_attention", "value"),
        ("store_kv", "key"),
        ("few_row_linear", "x"),
        ("sample", "logits"),
    ],
)
def test_no_transform_loses_a_gradient(op, name, transform):
    """The table has plain ``requires_grad``, for every argument."""

    def call(tensor):
        arguments = good(op) | {name: tensor}
        out = FUNCTIONS[op](**arguments, backend="native")
        return arguments["key_cache"] if out is None else out.logprob if op == "sample" else out[0]

    with pytest.raises(Exception, match=rf"{name} must not (require grad|have a tangent), since (native )?{op} has no"):
        along(transform, call, good(op)[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "op", ["paged_attention", "shared_attention", "few_row_linear", "sample", "store_kv", "copy_pages"]
)
def test_where_gradients_are_not_recorded_every_tensor_is_taken(op, mode):
    expected, arguments = outcome(FUNCTIONS[op], good(op), "native"), good(op)
    floats = [tensor for tensor in arguments.values() if torch.is_tensor(tensor) and tensor.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_()
    with mode():
        got = outcome(FUNCTIONS[op], arguments, "native")
    assert floats and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_reference_of_attention_is_differentiable():
    """Also where a query sees no key, or only some."""
    torch.manual_seed(0)
    query, cache = torch.randn(5, 2, 3).double(), torch.randn(2, 3, 2, 1, 3).double()
    page_table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    lens, starts = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    tensors = [tensor.requires_grad_() for tensor in (query, *cache)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.paged_attention(q, k, v, page_table, lens, starts, 0.7)[0], tensors
    )
    group, images = torch.tensor([1, -1, 0, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 3, 3])
    tensors[1:] = [tensor.detach().flatten(0, 1)[:3].requires_grad_() for tensor in tensors[1:]]
    assert torch.autograd.gradcheck(lambda q, k, v: reference.shared_attention(q, k, v, group, images, 0.7)[0], tensors)


@pytest.mark.parametrize("transform", ["backward", "torch.func.grad"])
def test_the_reference_of_store_kv_is_differentiable(transform):
    def stored(key):
        arguments = good("store_kv") | {"key": key}
        cache = arguments["key_cache"] = arguments["key_cache"] + 0 * key.sum()
        store_kv(**arguments, backend="reference")
        return cache

    expected = torch.ones(3, 2, 4)
    expected[1] = 0  # its slot is -1
    assert torch.equal(along(transform, stored, good("store_kv")["key"]), expected)


@pytest.mark.parametrize(("T", "V"), [(0, 5), (3, 0)])
def test_gradients_without_elements(T, V):
    targets = torch.full((T,), -100)
    logits, hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((T, V), (T, 4), (V, 4)))
    token_logprobs(logits, targets, backend="native").sum().backward()
    linear_logprobs(hidden, weight, targets, backend="native").sum().backward()
    for tensor in (logits, hidden, weight):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


# ---- writes ----


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autograd_notices_writes(backend, mode):
    stored, copied = good("store_kv"), good("copy_pages")
    pool, table = PagePool(4, 2), torch.zeros(1, 3, dtype=torch.int32)
    seq = pool.create()
    with mode():
        store_kv(**stored, backend=backend)
        copy_pages(**copied, backend=backend)
        pool.page_table([seq], out=table)
    for tensor in (stored["key_cache"], stored["value_cache"], copied["kv_cache"], table):
        assert tensor._version > 0
    assert stored["key"]._version == copied["copies"]._version == 0


@pytest.mark.parametrize("through", ["store_kv", "copy_pages"])
def test_a_backward_that_saved_the_cache_raises(through):
    arguments = good(through)
    cache = arguments["key_cache" if through == "store_kv" else "kv_cache"]
    loss = (torch.ones_like(cache, requires_grad=True) * cache).sum()
    FUNCTIONS[through](**arguments, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_write_is_noticed_too():
    torch._dynamo.reset()
    arguments = good("store_kv")
    torch.compile(lambda given: store_kv(**given), fullgraph=True, backend="aot_eager")(arguments)
    assert arguments["key_cache"]._version > 0 and arguments["value_cache"]._version > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("op", "name"), [("store_kv", "value_cache"), ("copy_pages", "kv_cache")])
def test_a_leaf_is_not_written(op, name, backend):
    for view in (lambda leaf: leaf, lambda leaf: leaf.view(leaf.shape)):
        leaf = good(op)[name].requires_grad_()
        before = leaf.detach().clone()
        arguments = good(op) | {name: view(leaf)}
        with pytest.raises(ValueError, match=f"{name} must not be a leaf that requires grad or a view of one"):
            FUNCTIONS[op](**arguments, backend=backend)
        assert torch.equal(leaf, before)
        with torch.no_grad():
            FUNCTIONS[op](**arguments, backend=backend)
        assert not torch.equal(leaf, before)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_tensors_are_written(inside):
    with torch.inference_mode():
        stored, copied = good("store_kv"), good("copy_pages")
        stored |= {name: stored[name].clone() for name in CACHES}
        copied["kv_cache"] = copied["kv_cache"].clone()
    expected = outcome(store_kv, good("store_kv"), "native"), outcome(copy_pages, good("copy_pages"), "native")
    with torch.inference_mode(inside):
        store_kv(**stored, backend="native")
        copy_pages(**copied, backend="native")
    assert stored["key_cache"].is_inference() and copied["kv_cache"].is_inference()
    for name, right in zip(CACHES, expected[0]):
        assert torch.equal(stored[name], right)
    assert torch.equal(copied["kv_cache"], expected[1][0])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_written_shares_no_memory(backend):
    memory = torch.zeros(6 * 16)  # six pages
    first, shifted = memory[: 5 * 16].view(5, 2, 2, 4), memory[16:].view(5, 2, 2, 4)
    rows = memory[-24:].view(3, 2, 4)
    strided = memory[1::4][:24].as_strided((3, 2, 4), (32, 4, 1))  # its last row is past ``first``
    for change, message in [
        ({"key_cache": first, "value_cache": first}, "key_cache must not share memory with value_cache"),
        ({"key_cache": first, "value_cache": shifted}, "key_cache must not share memory with value_cache"),
        ({"value_cache": shifted, "key": rows}, "value_cache must not share memory with key"),
        ({"key_cache": first, "value": strided}, "key_cache must not share memory with value"),
    ]:
        with pytest.raises(ValueError, match=message):
            store_kv(**good("store_kv") | change, backend=backend)
    assert not memory.any()
    side_by_side = torch.zeros(2, 5, 2, 2, 4)
    store_kv(**good("store_kv") | dict(zip(CACHES, side_by_side)), backend=backend)
    assert side_by_side[0].any() and side_by_side[1].any()


@pytest.mark.parametrize("copies", [[[0, 3], [1, 3]], [[0, 3], [3, 1]], [[1, 0], [3, 1]]])
def test_copies_without_a_fixed_order_are_refused(backend, copies):
    given = good("copy_pages") | {"copies": torch.tensor(copies, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"copies must have distinct targets that are never sources, got \[\["):
        copy_pages(**given, backend=backend)


def test_a_page_may_be_copied_to_itself(backend):
    given, before = good("copy_pages"), good("copy_pages")["kv_cache"]
    copy_pages(given["kv_cache"], torch.tensor([[2, 2], [2, 2], [2, 0]], dtype=torch.int32), backend=backend)
    assert torch.equal(given["kv_cache"][:, :, 1:], before[:, :, 1:])
    assert torch.equal(given["kv_cache"][:, :, 0], before[:, :, 2])


# ---- on the host ----


def test_the_pool_refuses_other_types():
    pool = PagePool(4, 2)
    seq = pool.create()
    for call in (
        lambda: PagePool(4.0, 2),
        lambda: PagePool(4, None),
        lambda: PagePool(2**64, 2),
        lambda: pool.fork(None, 1),
        lambda: pool.fork(seq, 1.0),
        lambda: pool.append(seq, 1),
        lambda: pool.append([seq], [1.5]),
        lambda: pool.append([None], [1]),
        lambda: pool.append([seq], [2**64]),
        lambda: pool.append("0", [1]),
        lambda: pool.truncate(seq, "0"),
        lambda: pool.page_table(seq),
        lambda: pool.page_table([0.5]),
        lambda: pool.length([seq]),
        lambda: pool.ref_count(None),
    ):
        with pytest.raises(TypeError):
            call()
    assert pool.num_free == 4 and pool.sequences() == [seq] and pool.length(seq) == 0


def test_the_pool_fills_no_table_that_it_cannot():
    pool = PagePool(4, 2)
    seqs = [pool.create(), pool.create()]
    pool.append(seqs, [3, 1])
    table = torch.zeros(2, 3, dtype=torch.int32)
    for out, error, message in [
        ([[0, 0], [0, 0]], TypeError, r"out must be a tensor \[2, P\], got list"),
        (table.numpy(), TypeError, r"out must be a tensor \[2, P\], got ndarray"),
        (table.to("meta"), ValueError, "out must be a dense tensor on the CPU, got layout torch.strided on meta"),
        (table.to_sparse(), ValueError, "out must be a dense tensor on the CPU, got layout torch.sparse_coo on cpu"),
        (table[:1].expand(2, 3), ValueError, r"out must not overlap itself, got .* strides \(0, 1\)"),
        (table[:, :1].expand(2, 3), ValueError, r"out must not overlap itself, got .* strides \(3, 0\)"),
        (table.as_strided((2, 3), (2, 1)), ValueError, r"out must not overlap itself, got .* strides \(2, 1\)"),
        (table.float(), TypeError, "out must be int32, got torch.float32"),
        (table[0], ValueError, r"out must be \[2, at least 2\], got torch.Size\(\[3\]\)"),
        (table[:, :0], ValueError, r"out must be \[2, at least 2\]"),
    ]:
        with pytest.raises(error, match=message):
            pool.page_table(seqs, out=out)
    assert not table.any()
    for out in (table, table.T.contiguous().T, torch.zeros(2, 6, dtype=torch.int32)[:, ::2]):
        assert pool.page_table(seqs, out=out) is out
        assert out.tolist() == [[0, 1, 0], [2, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([b"a"], "<A>"), "tags must be a sequence of strings, got '<A>'"),
        (([b"a"], b"<A>"), "tags must be a sequence of strings, got b'<A>'"),
        (([b"a"], [3]), "tags must hold byte strings, got int"),
        (([b"a", 5], ["<A>"]), "token_bytes must hold byte strings, got int"),
        ((["a"], ["<A>"]), "token_bytes must hold byte strings, got str"),
        (([None], ["<A>"]), "token_bytes must hold byte strings, got NoneType"),
    ],
)
def test_stage_tags_refuse_what_is_not_bytes(arguments, message):
    with pytest.raises(TypeError, match=message):
        StageTags(*arguments)


if __name__ == "__main__":
    main()
