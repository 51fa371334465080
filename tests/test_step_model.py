"""The decode step on paper: what it counts is what the model's modules have and what their code launches."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import step_model
from step_model import CARDS, Step, Trace

TEXT, PRIVATE, TILES = 600, 75, 4
OF_THE_PREFILL = ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")


def trace(n: int, **shape) -> tuple[torch.nn.Module, Step]:
    model = build_random_mllama(**TINY_SHAPE | shape, seed=0).to(torch.bfloat16).to("meta")
    return model, Step.trace(model, n, TILES, TEXT, PRIVATE)


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (3, 4), (16, 16)])
def test_a_step_reads_each_weight_of_the_decoder_once(n, rows):
    model, step = trace(n)
    gemms = [kernel for kernel in step.kernels if kernel.part == "GEMMs"]
    decoder = {name: value for name, value in model.named_parameters() if "language_model.layers" in name}
    read = {name for name, value in decoder.items() if value.dim() == 2 and not name.endswith(OF_THE_PREFILL)}
    names = defaultdict(list)  # by storage: weights that are multiplied with the same input share one
    for name, value in model.named_parameters():
        names[StorageWeakRef(value.untyped_storage())].append(name)
    storages = [kernel.weight.untyped_storage() for kernel in step.kernels if kernel.weight is not None]
    found = Counter(name for each in storages for name in names[StorageWeakRef(each)])
    assert found == Counter([*read, "lm_head.weight"])
    assert {kernel.shape[2] for kernel in gemms} == {rows}
    others = sum(value.nbytes for value in decoder.values() if value.dim() == 1)  # norms and gates
    assert sum(kernel.nbytes for kernel in gemms) + others == step.bytes["GEMMs"]


@pytest.mark.parametrize(("n", "grouping"), [(1, 0), (16, 1)])
def test_a_layer_has_the_nodes_that_its_code_launches(n, grouping):
    """Counted by hand in transformers' modelling code and in ours, for bfloat16."""
    norm = 8  # to float32, square, mean, add eps, rsqrt, multiply, to bfloat16, multiply
    mlp = 2 + 2  # two GEMMs, silu, multiply
    rope = 2 * 5  # of query and key: negate, concatenate, multiply twice, add
    attention = grouping + 2  # attend, merge
    self_layer = 2 * norm + 2 + rope + 1 + attention + 1 + mlp + 1  # two GEMMs, store_kv; two residual sums
    cross_layer = 3 * norm + 2 + 2 + 3 + mlp + 3  # two GEMMs, attend, merge; twice tanh, multiply, add
    (_, base), (_, more_self), (_, more_cross) = trace(n), trace(n, layers=6), trace(n, layers=5, cross=[1, 3, 4])
    for more, plain in ((more_self, 2 * self_layer), (more_cross, cross_layer)):
        assert more.nodes(False).total() - base.nodes(False).total() == plain


def test_what_the_model_does_not_know_raises():
    with pytest.raises(ValueError, match=r"must be in a list of benchmarks/step_model.py, got aten.sort"), Trace({}):
        torch.empty(3, device="meta").sort()
    with pytest.raises(ValueError, match=r"must be in PART_OF_KERNEL of benchmarks/step_model.py, got _attend_more"):
        Trace({})._note("_attend_more")


def test_what_was_measured_takes_the_place_of_what_is_assumed(tmp_path):
    _, step = trace(3)  # as 4 rows
    (n, k, _) = next(kernel.shape for kernel in step.kernels if kernel.part == "GEMMs")
    gemms = [{"name": "", "n": n, "k": k, "m": m, "us": us, "tb_s": 1.0} for m, us in ((1, 1.0), (16, 3.0), (8, 2.0))]
    path = tmp_path / "floor.json"
    path.write_text(json.dumps({"device": "NVIDIA H100", "copy_tb_s": 3.1, "graph_node_us": 0.5, "rows": gemms}))
    ((name, card),) = step_model.read_floor(path).items()
    assert (name, card.copy_tb_s, card.node_us, card.key_block_us) == ("H100", 3.1, 0.5, CARDS["H100"].key_block_us)
    first = next(kernel for kernel in step.kernels if kernel.part == "GEMMs")
    assert step_model.gemm_us(card, first) == 2.0

    kernels = {"nvjet_tst_64x8": 4000.0, "_attend_paged": 200.0, "vectorized_elementwise_kernel": 1500.0}
    table = step_model.parts_table(step, {name: card}, False, {"ms": 6.0, "profile": {"microseconds": kernels}})
    shown = {cells[1].strip(): cells[-3].strip() for cells in (line.split("|") for line in table.splitlines())}
    expected = {"GEMMs": "4.00", "attention": "0.20", "tiny kernels": "1.50", "bubble": "0.30", "total": "6.00"}
    assert expected.items() <= shown.items()
