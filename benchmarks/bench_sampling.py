"""Time sample and its stop test beside their peers: ``python benchmarks/bench_sampling.py``."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import Case, main
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    MinPLogitsWarper,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_cot import tiny_path
from llava_cot_kernels.backend import available
from llava_cot_kernels.sampling import sample
from llava_cot_kernels.stage_tags import StageTags

LLAMA, GEMMA = 128_256, 262_144  # vocabularies
TEMPERATURE = 0.6
FILTERS: dict[str, dict[str, Any]] = {
    "unfiltered": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
}
Providers = dict[str, Callable[[], Any]]


def cases(device: str, report: bool) -> Iterator[Case]:
    if not report:
        yield sample_case(device, "flat", 4, 8192, "top_p 0.9")
        yield stop_case(device)
        return
    for rows in ("flat", "peaked"):
        yield sample_case(device, rows, 16, LLAMA, "top_p 0.9", with_compiled=rows == "flat")
    for name in ("unfiltered", "top_k 50", "top_k 50, top_p 0.9", "min_p 0.05"):
        yield sample_case(device, "flat", 16, LLAMA, name)
    yield sample_case(device, "flat", 1, LLAMA, "top_p 0.9")
    yield sample_case(device, "flat", 16, GEMMA, "top_p 0.9")
    yield sample_case(device, "flat", 16, LLAMA, "top_p 0.9", dtype=torch.bfloat16)
    if device == "cuda":
        yield sample_case(device, "flat", 256, LLAMA, "top_p 0.9")
        yield sample_case(device, "peaked", 256, LLAMA, "top_p 0.9", dtype=torch.bfloat16)
    yield stop_case(device)


def sample_case(
    device: str,
    rows: str,
    n: int,
    vocabulary: int,
    filter_name: str,
    dtype: torch.dtype = torch.float32,
    with_compiled: bool = False,
) -> Case:
    """Build a case. Every provider except log_softmax gives a token and both log-probs; ours gives the entropy too."""
    logits = torch.randn(n, vocabulary, device=device)
    if rows == "peaked":
        logits = logits * 2
        logits[:, :: vocabulary // 3] += 16
    logits = logits.to(dtype)
    filters = FILTERS[filter_name]
    peers: Providers = {"torch.log_softmax alone": lambda: torch.log_softmax(logits, 1)}
    peers["transformers"] = transformers_pipeline(logits, filters)
    if device == "cuda":
        peers |= flashinfer_pipelines(logits, filters)

    index = torch.arange(n, device=device)
    parameters = {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    tensors = {name: torch.full((n,), value, device=device) for name, value in parameters.items()}

    def call(backend: str) -> Any:
        given = filters | {"temperature": TEMPERATURE} if backend == "reference" else tensors  # tensors make it sort
        return sample(logits, row=index, seed=index, position=index, backend=backend, **given)

    ours: Providers = {name: lambda name=name: call(name) for name in available("sample", device)[::-1]}
    if with_compiled:
        ours["reference, compiled"] = torch.compile(lambda: call("reference"), dynamic=False)

    def check() -> None:
        expected = call("reference")
        for out in (provider() for provider in ours.values()):
            assert torch.equal(out.token, expected.token)
            for field in ("logprob", "sampling_logprob", "entropy"):
                torch.testing.assert_close(getattr(out, field), getattr(expected, field), rtol=0, atol=1e-4)
        processed = processors(filters)(None, logits.float()).log_softmax(1)
        of_token = processed.gather(1, expected.token[:, None])[:, 0]
        torch.testing.assert_close(expected.sampling_logprob, of_token, rtol=0, atol=0.02)  # it drops ties
        for name, peer in peers.items():
            if name != "torch.log_softmax alone":
                assert processed.gather(1, peer()[0].long().view(-1, 1)).isfinite().all(), name

    name = f"N={n} V={vocabulary} {str(dtype)[6:]}, temperature {TEMPERATURE}, {filter_name}, {rows} rows"
    return Case("sample", name, peers | ours, logits.nbytes, check)


# ---- peers ----


def processors(filters: dict[str, Any]) -> LogitsProcessorList:
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    chosen = [warpers[name](value) for name, value in filters.items()]
    return LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), *chosen])


def transformers_pipeline(logits: torch.Tensor, filters: dict[str, Any]) -> Callable[[], Any]:
    """Draw as ``generate(output_logits=True, output_scores=True)`` does, and compute the two log-probs."""
    process = processors(filters)

    def step() -> tuple[torch.Tensor, ...]:
        raw = logits.float()
        scores = process(None, raw)
        token = torch.multinomial(scores.softmax(-1), 1)
        return token, raw.log_softmax(-1).gather(1, token), scores.log_softmax(-1).gather(1, token)

    return step


def flashinfer_pipelines(logits: torch.Tensor, filters: dict[str, Any]) -> Providers:
    """Return FlashInfer's sampler alone and with the raw log-prob. It has no log-prob of the filtered distribution."""
    try:
        from flashinfer import sampling as flashinfer
    except ImportError:
        print("FlashInfer is not measured: it is not installed")
        return {}

    def draw() -> tuple[torch.Tensor]:
        random = {"seed": 1, "offset": 0}  # given, because a graph could not capture a call of a generator
        if filters.keys() == {"top_k", "top_p"}:
            token = flashinfer.top_k_top_p_sampling_from_logits(logits.float() / TEMPERATURE, **filters, **random)
            return (token,)
        probs = flashinfer.softmax(logits.float(), temperature=TEMPERATURE)
        if not filters:
            return (flashinfer.sampling_from_probs(probs, **random),)
        ((name, value),) = filters.items()
        return (getattr(flashinfer, f"{name}_sampling_from_probs")(probs, value, **random),)

    def draw_and_score() -> tuple[torch.Tensor, ...]:
        (token,) = draw()
        return token, torch.log_softmax(logits.float(), -1).gather(1, token.long()[:, None])

    return {"FlashInfer": draw, "FlashInfer + log-prob": draw_and_score}


# ---- the stop test ----


def stop_case(device: str, n: int = 16, tag: str = "</CAPTION>") -> Case:
    """Build a step of ``n`` candidates, of which every second one closes the tag."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    body = "<CAPTION>" + " The image shows two red cubes and a small blue ball." * 4 + " "
    texts = [tokenizer(body + tag, add_special_tokens=False).input_ids] * n
    ids = torch.tensor(texts, device=device)
    ids[1::2, -1] = tokenizer("a", add_special_tokens=False).input_ids[0]
    tags = StageTags.from_tokenizer(tokenizer, [tag])
    state = tags.start_state
    for token in texts[0][:-1]:
        state = tags.advance(state, token)[0]
    logits = torch.full((n, tags.num_tokens), -50.0, device=device).scatter_(1, ids[:, -1:], 0.0)
    on_device = tags.to(device)
    states = torch.full((n,), state, dtype=torch.int32, device=device)
    index = torch.arange(n, device=device)
    criteria = StopStringCriteria(tokenizer, [tag])

    def draw(backend: str, **tagged: Any) -> Any:
        return sample(logits, row=index, seed=index, position=0, backend=backend, **tagged)

    def stop_strings() -> torch.Tensor:
        draw("auto")
        return criteria(ids, None)

    def decode() -> list[bool]:  # as in serving loops: decode the last few tokens
        draw("auto")
        return [tag in text for text in tokenizer.batch_decode(ids[:, -16:], skip_special_tokens=True)]

    def inside_sample(backend: str) -> torch.Tensor:
        return draw(backend, tags=on_device, tag_state=states).tag >= 0

    providers: Providers = {"sample, then StopStringCriteria": stop_strings, "sample, then decode the text": decode}
    backends = available("sample", device)[::-1]
    providers |= {name: lambda name=name: inside_sample(name) for name in backends}

    def check() -> None:
        for name, provider in providers.items():
            assert torch.as_tensor(provider()).tolist() == [True, False] * (n // 2), name

    return Case("stop test", f"a draw and its stop test, {n} candidates", providers, 0, check)


if __name__ == "__main__":
    main(cases, __doc__)
