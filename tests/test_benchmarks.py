"""The benchmarks' own machinery on tiny models: warm runs, what a failure leaves behind, and the static rival."""

import copy
import importlib
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from helpers.recording import Noting
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from transformers.generation import GenerationMixin

from llava_cot import GreedyConfig
from llava_cot.engine.plan import memory_plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import bench_batch  # noqa: E402
import bench_canary  # noqa: E402
import bench_logprob_memory  # noqa: E402
import bench_quantize  # noqa: E402
import bench_search  # noqa: E402
import bench_step_reward  # noqa: E402
import bench_throughput  # noqa: E402
import bench_token_beam  # noqa: E402
import static_decode  # noqa: E402
from static_decode import StaticDecoder, prefill  # noqa: E402

GIVEN = 'add_argument("--device"'
WITH_DEVICE = sorted(path.name for path in BENCHMARKS.glob("bench_*.py") if GIVEN in path.read_text())
WITH_DEVICE += [f"bench_{stem}.py" for stem in ("attention", "logprob", "paged_kv", "sampling")]  # timing.main's
GIB = 2**30


@pytest.fixture(scope="module")
def endless():
    """A tiny Mllama that never ends by itself."""
    model = build_random_mllama(**TINY_SHAPE, seed=0)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call ``main`` of a benchmark with these arguments: its exit code and its rows."""

    def call(module, *arguments):
        path = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments, "--json", str(path)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = 1 if isinstance(end.code, str) else end.code
        return code, json.loads(path.read_text())["rows"]

    return call


@pytest.fixture
def train_memory():
    pytest.importorskip("pydantic")
    return importlib.import_module("bench_train_memory")


@pytest.fixture
def train_step(train_memory):
    return importlib.import_module("bench_train_step")


@pytest.fixture
def small(monkeypatch, endless):
    for module in (bench_search, bench_token_beam, bench_throughput):
        monkeypatch.setattr(module, "build_model", lambda device: endless)
    stages = {"SUMMARY": 2, "CAPTION": 4, "REASONING": 3, "CONCLUSION": 2}
    monkeypatch.setattr(bench_search, "STAGE_TOKENS", stages)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


WORK = ("decoded_tokens", "prefilled_tokens", "image_encodings")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 53.70 GiB.\nMore lines")


def test_search_is_warm_before_it_is_timed(run, small):
    code, rows = run(bench_search, "--peers", "cached", "static", "published")
    assert code == 0
    assert [row["way"] for row in rows] == ["engine", "cached", "cached, static graph", "published"]
    assert [row["first_run"] for row in rows] == ["the same search"] + 3 * ["one question, 2 tokens a stage"]
    assert all(row["seconds"] > 0 and row["first_seconds"] > 0 for row in rows)
    assert [row.get("agreement") for row in rows] == [1.0, 1.0, None, 1.0]


def test_every_form_of_generate_draws_the_tokens_of_the_engine(run, small):
    code, (_, cached, static, returned, returned_static, published) = run(
        bench_search, "--peers", "cached", "cached-static", "returned", "returned-static", "published"
    )
    assert code == 0
    pairs = [(cached, cached), (static, cached), (returned, published)]
    if "error" not in returned_static:  # transformers before 5.24 has no static cache for Mllama
        pairs.append((returned_static, published))
    for row, plain in pairs:
        assert row["agreement"] == 1.0
        assert {key: row[key] for key in WORK} == {key: plain[key] for key in WORK}


def test_a_transformers_without_a_static_cache_is_no_failure(run, small, monkeypatch, endless):
    monkeypatch.setattr(type(endless), "_prepare_static_cache", GenerationMixin._prepare_static_cache)
    code, (_, row) = run(bench_search, "--peers", "returned-static", "--questions", "1")
    assert code == 0
    assert "has no static cache for Mllama" in row["error"]


def test_other_weights_need_not_give_the_same_tokens(run, small, monkeypatch):
    sizes = {**TINY_SHAPE, "hidden": 64}
    monkeypatch.setattr(bench_search, "build_model", lambda device: build_random_mllama(**sizes, seed=0))
    for weights in (["--dtype", "bfloat16"], ["--quantize", "int8"]):
        if "int8" in weights:
            pytest.importorskip("torchao")
        code, rows = run(bench_search, *weights, "--peers", "cached", "returned", "--questions", "1")
        assert code == 0
        assert all(0 <= row["agreement"] <= 1 for row in rows)


def test_the_static_loop_does_the_work_of_the_cached_one(run, small, monkeypatch):
    drawn = {}

    def counting(way, name):
        draw = way.draw

        def counted(self, prefix, seeds, params, limit, *rest):
            texts = draw(self, prefix, seeds, params, limit, *rest)
            drawn.setdefault(name, []).append((len(prefix), [len(text.tokens) for text in texts]))
            return texts

        monkeypatch.setattr(way, "draw", counted)

    counting(bench_search.CachedWay, "cached")
    counting(bench_search.StaticWay, "static")
    code, _ = run(bench_search, "--peers", "cached", "static", "--questions", "1", "--rounds", "2")
    assert code == 0
    assert drawn["static"] == drawn["cached"]


@pytest.mark.parametrize(("error", "code"), [(OUT_OF_MEMORY, 0), (ValueError("no such kernel"), 1)])
def test_a_loop_that_fails_takes_no_figures_of_the_others(run, small, monkeypatch, capsys, error, code):
    monkeypatch.setattr(bench_search, "CachedWay", raising(error))
    found, rows = run(bench_search, "--peers", "cached", "published", "--questions", "1")
    assert found == code
    engine, cached, published = rows
    assert engine["seconds"] > 0 and published["agreement"] == 1.0
    assert cached["error"].startswith(f"{type(error).__name__} at test_benchmarks.py:")
    assert "More lines" not in cached["error"]
    assert f"cached failed: {cached['error']}" in capsys.readouterr().out


def test_an_engine_that_fails_leaves_the_loops_their_figures(run, small, monkeypatch):
    monkeypatch.setattr(bench_search, "SwiresGenerator", raising(OUT_OF_MEMORY))
    code, (engine, cached) = run(bench_search, "--peers", "cached", "--questions", "1")
    assert code == 1
    assert "OutOfMemoryError" in engine["error"]
    assert cached["seconds"] > 0 and "agreement" not in cached


def test_steps_are_scored_in_both_ways(run, monkeypatch):
    sizes = dict(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=645, vision_hidden=16, vision_layers=2)
    stages = {"SUMMARY": 2, "CAPTION": 4, "REASONING": 3, "CONCLUSION": 1}
    small = {"MODEL": sizes, "STAGE_TOKENS": stages, "SYSTEM_TOKENS": 5, "QUESTION_TOKENS": 4, "SIDE": 56}
    for name, value in small.items():
        monkeypatch.setattr(bench_step_reward, name, value)
    code, rows = run(bench_step_reward)
    assert code == 0
    assert [row["way"] for row in rows] == ["incremental", "full"]
    assert all(row["ms"]["median"] > 0 for row in rows) and rows[0]["ratio"] == 1
    monkeypatch.setattr(bench_step_reward, "TOLERANCE", -1.0)
    code, _ = run(bench_step_reward)
    assert code == 1


def test_other_tokens_than_the_engine_are_an_error(run, small, monkeypatch):
    monkeypatch.setattr(bench_search, "CachedWay", partial(bench_search.StaticWay, decoders={}, max_new_tokens=11))
    code, (_, cached) = run(bench_search, "--peers", "cached", "--questions", "1")
    assert code == 1
    assert "other tokens" in cached["error"]


def test_what_is_stopped_midway_keeps_its_rows(run, small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_search, "CachedWay", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(bench_search, "--questions", "1")
    (engine,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert engine["way"] == "engine" and engine["seconds"] > 0


def test_the_engine_has_pages_for_what_is_asked_and_no_more(run, small, monkeypatch):
    engines, plain = [], bench_search.SwiresGenerator
    monkeypatch.setattr(bench_search, "SwiresGenerator", lambda *a, **k: engines.append(plain(*a, **k)) or engines[-1])
    run(bench_search, "--peers", "--questions", "3", "--rounds", "3")
    runner = engines[0].engine.runner
    assert runner.peak_pages <= runner.pool.num_pages <= 20 * runner.peak_pages


def test_token_beam_is_warm_and_survives_its_peer(run, small, monkeypatch):
    plain = bench_token_beam.run_transformers

    def failing(model, inputs, num_beams, new_tokens):
        if num_beams == 2:
            raise OUT_OF_MEMORY
        return plain(model, inputs, num_beams, new_tokens)

    monkeypatch.setattr(bench_token_beam, "run_transformers", failing)
    code, rows = run(bench_token_beam, "--beams", "2", "3", "--tokens", "5")
    assert code == 0
    assert [(row["beams"], row["way"], "error" in row) for row in rows] == [
        (2, "engine", False),
        (2, "transformers", True),
        (3, "engine", False),
        (3, "transformers", False),
    ]
    assert all(row["first_seconds"] > 0 and row["seconds"] > 0 for row in rows if "error" not in row)
    assert rows[3]["agreement"] == 1.0


def test_throughput_asks_in_turn_what_does_not_fit_together(run, small, monkeypatch, endless):
    plain, asked = endless.generate, []

    def tight(**kwargs):
        rows = len(kwargs["input_ids"])
        if rows > 1:
            raise OUT_OF_MEMORY
        asked.append(kwargs["max_new_tokens"])
        return plain(**kwargs)

    monkeypatch.setattr(endless, "generate", tight)
    arguments = ("--questions", "1", "6", "--candidates", "2", "--tokens", "4", "--in-turn", "2")
    code, rows = run(bench_throughput, *arguments)
    assert code == 0
    assert [(row["questions"], row["way"]) for row in rows] == [
        (1, "engine"),
        (1, "transformers, all at once"),
        (6, "engine"),
        (6, "transformers, all at once"),
        (6, "transformers, in turn, from 2 of them"),
    ]
    assert ["error" in row for row in rows] == [False, False, False, True, False]
    assert asked == [2, 4, 2, 4, 4]  # a short call before each that is timed
    assert all(row["first_seconds"] > 0 for row in rows if "error" not in row)
    assert rows[4]["tokens_per_second"] == pytest.approx(6 * 2 * 4 / rows[4]["seconds"])


def test_batch_keeps_its_rows_when_it_is_stopped(run, monkeypatch, tmp_path):
    shares = dict.fromkeys(("matrix", "attention", "drawing", "other_ops", "host"), 0.2)

    def stopped(generator, name, samples, label=""):
        yield bench_batch.Figures(name, 1, 1.0, 1.0, 1, 1, 1, 1.0, shares)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_batch, "bench", stopped)
    monkeypatch.setattr(bench_batch, "ask", lambda *args: [])
    with pytest.raises(KeyboardInterrupt):
        run(bench_batch, "--questions", "1")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["search"] == "greedy" and row["steps_ratio"] == 1.0


def test_the_canary_is_timed_in_turns(run, monkeypatch):
    orders = []
    monkeypatch.setattr(bench_canary, "SEARCHES", {"greedy": GreedyConfig(max_new_tokens=3)})
    turn = bench_canary.turn
    monkeypatch.setattr(bench_canary, "turn", lambda by, *rest: orders.append([*by]) or turn(by, *rest))
    _, rows = run(bench_canary, "--groups", "1", "2", "--turns", "3")  # whether it is fast enough is not of interest
    assert [(row["search"], row["group"], len(row["ratios"])) for row in rows] == [("greedy", 1, 3), ("greedy", 2, 3)]
    assert orders == 4 * [["off", "on"], ["on", "off"]]
    assert all(row["on"] > 0 < row["off"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", WITH_DEVICE)
def test_without_a_gpu_nothing_is_built(name, monkeypatch, capsys):
    if name.startswith("bench_train"):
        pytest.importorskip("pydantic")
    monkeypatch.setattr(sys, "argv", [name, "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert end.value.code == 77
    assert capsys.readouterr().out == f"{name} needs a GPU: torch.cuda.is_available() is False\n"


def test_a_python_without_mlx_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_mlx.py", "--mlx-python", "/bin/false"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / "bench_mlx.py"), run_name="__main__")
    assert end.value.code == 77
    assert "needs the package mlx-vlm, which /bin/false does not have" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bench_train_memory.py", "bench_train_step.py"])
def test_a_missing_package_is_named(name, monkeypatch, capsys):
    for module in ("bench_train_memory", "llava_cot.train.config"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert end.value.code == 77
    assert capsys.readouterr().out == f"{name} needs the package pydantic, which is not installed\n"


def test_train_memory_goes_on_after_a_process_that_fails(run, monkeypatch, train_memory):
    def fake(*arguments):
        if arguments == ("step", "cpu", "float32", "1") or arguments[:2] == ("head", "plain"):
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")
        return {"planned": 2, "tracker": 1, "resident": 1, "seconds": 1.0}

    monkeypatch.setattr(train_memory, "in_process", fake)
    monkeypatch.setattr(train_memory, "HEAD_ROWS", (4,))
    code, rows = run(train_memory, "--device", "cpu")
    assert code == 1
    assert [row["part"] for row in rows] == ["step"] * 4 + ["head"] * 4
    assert [index for index, row in enumerate(rows) if "error" in row] == [1, 5, 7]
    assert rows[0]["ratio"] == 2


def test_a_process_that_fails_says_why(monkeypatch, tmp_path, train_memory):
    script = tmp_path / "failing.py"
    script.write_text("raise MemoryError('no room')")
    monkeypatch.setattr(train_memory, "__file__", str(script))
    with pytest.raises(RuntimeError, match="MemoryError: no room"):
        train_memory.in_process("step", "cpu", "float32", "0")


def test_logprob_memory_goes_on_after_a_provider_that_fails(run, monkeypatch):
    def fake(device, provider, *rest):
        if provider == "reference":
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")
        return 1 << 20

    monkeypatch.setattr(bench_logprob_memory, "measure", fake)
    code, rows = run(bench_logprob_memory, "--device", "cpu")
    assert code == 1 and len(rows) == 4
    assert set(rows[0]["extra_bytes"]) >= {"plain", "native"}
    assert set(rows[0]["errors"]) == {"reference"}


@pytest.mark.parametrize("name", ["none", "int8", "int4", "nf4"])
def test_figures_of_quantised_weights(name, tmp_path):
    if name != "none":
        pytest.importorskip("bitsandbytes" if name == "nf4" else "torchao")
    build_random_mllama(**{**TINY_SHAPE, "hidden": 128}, seed=0).save_pretrained(tmp_path)
    figures = bench_quantize.measure(str(tmp_path), name, "bfloat16", "cpu", [1, 3], 5)
    config = AutoConfig.from_pretrained(tmp_path)
    plan = memory_plan(config, quantize=None if name == "none" else name, dtype=torch.bfloat16)
    if name == "int4":  # matrices are padded on a GPU alone
        assert figures["weight_bytes"] < memory_plan(config, dtype=torch.bfloat16).weights / 2
    elif name == "nf4":  # a CPU that multiplies bfloat16 has them packed anew, with fewer bytes
        assert 0.9 * plan.weights < figures["weight_bytes"] <= plan.weights
    else:
        assert figures["weight_bytes"] == plan.weights
    assert figures["peak_bytes"] > 0 and all(figures["ms"][n] > 0 for n in ("1", "3"))


def test_quantised_weights_go_on_after_a_process_that_fails(run, monkeypatch, endless):
    def fake(folder, name, dtype, *rest):
        if name == "int4":
            raise RuntimeError("torch.OutOfMemoryError: out of memory")
        times = 3.0 if name == "nf4" else 1.0
        return {"weight_bytes": 4, "peak_bytes": 8, "ms": {"1": times, "4": 2.0}}

    monkeypatch.setattr(bench_quantize, "in_process", fake)
    monkeypatch.setattr(bench_quantize, "build_model", lambda device: endless)
    monkeypatch.setattr(bench_quantize, "check_quantize", lambda *arguments: None)
    code, rows = run(bench_quantize, "--device", "cpu", "--candidates", "1", "4")
    assert code == 1 and [(row["quantize"], row["dtype"]) for row in rows] == [*bench_quantize.CASES]
    assert [row["ms"]["1"] if "ms" in row else row["error"][:5] for row in rows] == [1, 1, 1, 1, "torch", 3, 3]


@pytest.mark.parametrize(("free", "layers"), [(138, 40), (80, 30), (40, 5), (10, 5)])
def test_as_many_text_layers_as_fit(free, layers, train_step):
    asked = []

    def plan(layers):  # of the 11B model, as simulate_step says
        asked.append(layers)
        return int((20.66 + 1.656 * layers) * GIB)

    found, planned = train_step.choose_layers(40, plan, free * GIB)
    assert found == layers and asked == [5, 10]
    assert planned == pytest.approx(plan(layers), rel=1e-6)


def test_a_train_step_of_a_part_of_the_layers(run, tmp_path, train_memory, train_step):
    text = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 4],
    )
    vision = dict(train_memory.SHAPES["124M"][1], hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    vision |= dict(num_global_layers=1, intermediate_layers_indices=[0, 1], vision_output_dim=48, image_size=28)
    train_memory.write_shape(tmp_path / "model", text, vision)
    arguments = ["--device", "cpu", "--model", str(tmp_path / "model"), "--layers", "3", "--row-tokens", "16"]
    code, (row,) = run(train_step, *arguments, "--images", "1", "--steps", "2")
    assert code == 0
    assert row["text_layers"] == 3 and row["planned"] < row["free"] and len(row["seconds"]) == 2
    settings = json.loads(Path(train_step.write_model(str(tmp_path / "model"), 3, tmp_path), "config.json").read_text())
    assert settings["text_config"]["cross_attention_layers"] == [1]


# ---- the static rival ----


def greedy(model, inputs, count):
    return model.generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs["input_ids"].shape[1] :]


@pytest.fixture(params=["called", "noted", "cuda"])
def recorded(request, monkeypatch, endless):
    """The model where steps run: called on the CPU, replayed there from their operators, or replayed on a GPU."""
    if request.param == "noted":
        monkeypatch.setattr(static_decode, "open_recorder", Noting)
    return copy.deepcopy(endless).to("cuda") if request.param == "cuda" else endless


@pytest.mark.parametrize(("n", "ratio_id"), [(1, 1), (3, 1), (1, 2), (3, 2), (3, 6)])
def test_static_decoding_is_greedy_generation(recorded, n, ratio_id):
    first, second = (random_inputs(recorded, length=11, ratio_id=ratio_id, seed=seed) for seed in (1, 2))
    decoder = StaticDecoder(recorded, first, n, 20)
    expected = greedy(recorded, first, 20)
    assert decoder.run(20).tolist() == [expected.tolist()] * n
    assert decoder.run(12, expected[:8].tolist()).tolist() == [expected[8:].tolist()] * n
    assert decoder.run(5).tolist() == [expected[:5].tolist()] * n  # the prefix is forgotten
    decoder.load(prefill(recorded, second))
    assert decoder.run(20).tolist() == [greedy(recorded, second, 20).tolist()] * n


class OnDevice(TorchDispatchMode):
    """Every tensor of every operator is on the meta device, whose values nobody can ask for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), function
        return found


def test_a_static_step_neither_waits_nor_leaves_the_device(endless):
    inputs = random_inputs(endless, length=7, ratio_id=2, seed=3)
    decoder = StaticDecoder(endless, inputs, 2, 9, temperature=1.0, top_p=0.9)
    decoder.model = decoder.decoding = copy.deepcopy(endless).to("meta")
    for holder in (decoder, *decoder.cache.layers):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.to("meta"))
    for layer in decoder.cache.layers:
        layer.device = torch.device("meta")
    with OnDevice():
        decoder._step()


def test_static_layers_are_compiled_once_for_all_of_a_kind(endless, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    inputs = random_inputs(endless, length=7, ratio_id=2, seed=3)
    for _ in range(2):
        decoder = StaticDecoder(endless, inputs, 3, 9, compile=True)
        assert decoder.run(9).tolist() == [greedy(endless, inputs, 9).tolist()] * 3
    assert counter.frame_count == 2  # of 2 self-attention and 2 cross-attention layers, of two decoders


def test_static_steps_go_on_where_the_last_ended(endless):
    inputs = random_inputs(endless, length=7, ratio_id=2, seed=3)
    decoder = StaticDecoder(endless, inputs, 2, 9)
    decoder.begin()
    for _ in range(9):
        decoder.step()
    assert decoder.drawn[1].tolist() == greedy(endless, inputs, 9).tolist()


def test_static_sampling_follows_the_filtered_probabilities(endless):
    inputs = random_inputs(endless, length=7, ratio_id=2, seed=3)
    narrow = StaticDecoder(endless, inputs, 2, 9, temperature=0.7, top_p=1e-6)
    assert narrow.run(9).tolist() == [greedy(endless, inputs, 9).tolist()] * 2
    decoder = StaticDecoder(endless, inputs, 1, 9, temperature=2.0, top_p=0.8)
    torch.manual_seed(0)
    probs = torch.tensor([0.1, 0.5, 0.05, 0.35])
    count = 20_000
    drawn = decoder._draw((probs.log() * 2).expand(count, -1)).flatten().bincount(minlength=4)
    assert drawn[0] == drawn[2] == 0
    assert drawn[1] / count == pytest.approx(0.5 / 0.85, abs=0.015)


def test_static_limits_are_checked(endless):
    inputs = random_inputs(endless, length=7, ratio_id=2, seed=3)
    decoder = StaticDecoder(endless, inputs, 2, 9)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 6\], got 7"):
        decoder.run(7, [1, 2, 3])
    longer = prefill(endless, random_inputs(endless, length=8, ratio_id=2, seed=3))
    with pytest.raises(ValueError, match="prompt must have 7 tokens and 2 tiles, got 8 and 2"):
        decoder.load(longer)
