"""Time forks, page copies and key/value writes beside their peers: ``python benchmarks/bench_paged_kv.py``."""

import copy
from collections.abc import Iterator

import torch
from timing import Case, main
from transformers import DynamicCache

from llava_cot_kernels.backend import available
from llava_cot_kernels.page_pool import PagePool
from llava_cot_kernels.paged_kv import copy_pages, store_kv

PAGE_SIZE, HEADS, DIM = 16, 8, 128  # as in Llama-3.2-11B-Vision


def cases(device: str, report: bool) -> Iterator[Case]:
    yield fork_case(device, layers=4)
    for copies in (1, 15):
        yield copy_case(device, copies, layers=32 if report else 4)
    for tokens in (16, 512):
        yield store_case(device, tokens)


def fork_case(device: str, layers: int, tokens: int = 2000, n: int = 16) -> Case:
    pool = PagePool(256, PAGE_SIZE)
    seq = pool.create()
    pool.append([seq], [tokens])
    prompt = DynamicCache()
    for layer in range(layers):
        prompt.update(*torch.randn(2, 1, HEADS, tokens, DIM, device=device).bfloat16(), layer)
    kids: list[int] = []

    def fork() -> None:
        kids.extend(pool.fork(seq, n))

    def free() -> None:
        while kids:
            pool.free(kids.pop())

    def repeat_interleave() -> DynamicCache:
        forked = copy.deepcopy(prompt)
        forked.batch_repeat_interleave(n)
        if device == "cuda":
            torch.cuda.synchronize()
        return forked

    def check() -> None:
        num_free = pool.num_free
        fork()
        assert pool.num_free == num_free  # no page was taken, so no byte has to move
        assert (pool.page_table(kids) == pool.page_table([seq])).all()
        free()
        assert repeat_interleave().layers[0].keys.shape[0] == n

    name = f"{tokens} tokens into {n}; the peer copies {layers} of 40 layers"
    return Case("fork", name, {"native": fork, "DynamicCache": repeat_interleave}, 0, check, free, on_host=True)


def copy_case(device: str, num_copies: int, layers: int) -> Case:
    kv_cache = torch.randn(2, layers, 2 * num_copies, PAGE_SIZE, HEADS, DIM, device=device).bfloat16()
    order = torch.randperm(2 * num_copies).int()
    copies = order.view(num_copies, 2).to(device)

    def layer_by_layer() -> None:  # as in transformers' continuous batching
        source, target = copies.long().unbind(1)
        for plane in kv_cache.flatten(0, 1):
            plane[target] = plane[source]

    def check() -> None:
        expected = kv_cache.clone()
        expected[:, :, copies[:, 1].long()] = expected[:, :, copies[:, 0].long()]
        for call in providers.values():
            kv_cache[:, :, copies[:, 1].long()] = torch.nan
            call()
            assert torch.equal(kv_cache, expected)

    backends = available("copy_pages", device)[::-1]
    providers = {"layer by layer": layer_by_layer}
    providers |= {name: lambda name=name: copy_pages(kv_cache, copies, backend=name) for name in backends}
    size = 2 * num_copies * 2 * layers * kv_cache[0, 0, 0].numel() * 2
    return Case(
        "copy_pages", f"{num_copies} pages of 16 tokens, {layers} layers, 8 x 128, bfloat16", providers, size, check
    )


def store_case(device: str, num_tokens: int) -> Case:
    key, value = torch.randn(2, num_tokens, HEADS, DIM, device=device).bfloat16()
    cache = torch.zeros(2, num_tokens // PAGE_SIZE + 8, PAGE_SIZE, HEADS, DIM, dtype=torch.bfloat16, device=device)
    slots = torch.randperm(cache[0, :, :, 0, 0].numel(), device=device)[:num_tokens]

    def index_copy() -> None:
        for side, rows in zip(cache, (key, value)):
            side.view(-1, HEADS, DIM).index_copy_(0, slots, rows)

    def check() -> None:
        for call in providers.values():
            cache.fill_(torch.nan)
            call()
            assert torch.equal(cache.flatten(1, 2)[:, slots], torch.stack([key, value]))

    backends = available("store_kv", device)[::-1]
    providers = {"index_copy_": index_copy}
    providers |= {name: lambda name=name: store_kv(key, value, *cache, slots, backend=name) for name in backends}
    return Case("store_kv", f"{num_tokens} tokens, 8 x 128, bfloat16", providers, 2 * 2 * key.numel() * 2, check)


if __name__ == "__main__":
    main(cases, __doc__)
