"""Options and fixtures of all tests. What xdist starts to hand out tests needs no torch, and imports none."""

import os
from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, settings

BACKENDS = {"reference", "native", "fibers", "triton", "cuda"}
SLOW = {"test_reference_loop", "test_trainer"}  # files
NEEDS_GPU = 77  # the exit code, where --gpu finds none

# On a busy machine every example may be slow.
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("full"), max_examples=20_000)  # --hypothesis-profile=long
settings.register_profile("short", settings.get_profile("full"), max_examples=25)
settings.load_profile("short")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run whole grids, where else a covering set of cases runs")
    parser.addoption("--gpu", action="store_true", help="run only the tests that need a GPU, on it")
    parser.addoption("--isa", help="the instruction set of the CPU kernels: avx512_bf16, avx512, avx2 or baseline")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: the test runs on a GPU, and is skipped without one")
    config.addinivalue_line(
        "markers",
        "covering(strength, **values): without --full, of the cases with these values only so many run that each value "
        "of each parameter occurs (strength 1) or each pair of values (strength 2)",
    )
    if config.getoption("full") and not config.getoption("hypothesis_profile"):
        settings.load_profile("full")
    if isa := config.getoption("isa"):
        from llava_cot_kernels import _C

        _C.set_isa(isa)
    if config.getoption("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.exit("the tests need a GPU: torch.cuda.is_available() is False", NEEDS_GPU)


def pytest_collectstart():
    import helpers  # noqa: F401  (before any kernel: it says whether Triton interprets)


def pytest_collection_modifyitems(config, items):
    import torch

    from llava_cot_kernels.backend import available

    if not config.getoption("full") and not config.getoption("gpu"):
        _leave_out_what_is_covered(config, items)
    items.sort(key=lambda item: item.path.stem not in SLOW)  # or one process is left alone with them at the end
    has_triton = "triton" in available("paged_attention", "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, others = [], []
    for item in items:
        backends = _backends(item)
        if "cuda" in backends:
            item.add_marker(pytest.mark.gpu)
        needs_gpu = item.get_closest_marker("gpu")
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "triton" in backends and not has_triton:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or Triton >= 3.7 or numpy < 2.5 to interpret"))
        # Where there is a GPU, Triton's kernels run on it instead of in the interpreter.
        (on_gpu if needs_gpu or "triton" in backends else others).append(item)
    if config.getoption("gpu"):
        config.hook.pytest_deselected(items=others)
        items[:] = on_gpu


def _leave_out_what_is_covered(config, items) -> None:
    from helpers.covering import covering

    grids = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("covering")
        if marker and all(item.callspec.params[name] == value for name, value in marker.kwargs.items()):
            grids[item.path, item.originalname, marker.args].append(item)
    left_out = {}
    for (*_, (strength,)), cases in grids.items():
        values = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        kept = covering(values, strength)
        left_out |= {case: None for at, case in enumerate(cases) if at not in kept}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


def _backends(item) -> set[str]:
    """Which back ends a test is about, by its parameters or else by the name of its file."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = {value for value in parameters if isinstance(value, str)} & BACKENDS
    of_triton = item.path.stem in ("test_triton_attention", "test_logprob_triton", "test_linear_triton")
    return found or ({"triton"} if of_triton else set())


def pytest_terminal_summary(terminalreporter):
    """Which back ends ran: a skip is not a pass. "fibers" are the CUDA sources in the host build of tests/fibers."""
    passed = Counter()
    for report in terminalreporter.stats.get("passed", []):
        passed.update(value for name, value in report.user_properties if name == "backend")
    ran = ", ".join(f"{name} {count}" for name, count in sorted(passed.items()))
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    terminalreporter.write_line(f"tests passed by back end: {ran or 'none'}".replace("triton", f"triton{interpreted}"))


@pytest.fixture(autouse=True)
def record_backend(request):
    request.node.user_properties.extend(("backend", name) for name in _backends(request.node))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads make so small a model many times slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def is_full(request):
    """Whether a test repeats itself as often as it can: with --full."""
    return request.config.getoption("full")


@pytest.fixture(scope="session")
def tiny():
    """The bundled model behind a generator."""
    from llava_cot import EngineConfig, SwiresGenerator

    return SwiresGenerator.from_pretrained("tiny", engine=EngineConfig(page_size=4))


@pytest.fixture(scope="session")
def fresh_tiny():
    """The bundled model, loaded by transformers alone."""
    from transformers import MllamaForConditionalGeneration

    from llava_cot import tiny_path

    return MllamaForConditionalGeneration.from_pretrained(tiny_path())


@pytest.fixture(scope="session")
def random_model():
    """A random Mllama with four tiles an image and opened gates."""
    from helpers.random_mllama import TINY_SHAPE, build_random_mllama

    return build_random_mllama(**TINY_SHAPE, seed=0)


@pytest.fixture(scope="session")
def bare_generator(tiny):
    """A generator on any model; its processor only stands in for a tokenizer."""
    from llava_cot import EngineConfig, SwiresGenerator
    from llava_cot.stages import LLAVA_COT

    def make(model, **kwargs):
        settings = {name: kwargs.pop(name) for name in ("bos", "grammar", "calibrations") if name in kwargs}
        settings.setdefault("grammar", LLAVA_COT)  # the tokenizer's
        return SwiresGenerator(model, tiny.processor, engine=EngineConfig(**kwargs), **settings)

    return make
