"""The server under load, its speed beside ``answer_batch``, and its memory.

    python benchmarks/bench_serve.py --threads 1
    python benchmarks/bench_serve.py --threads 1 --parts throughput --searches greedy --turns 9

``load`` sends all clients at once, with every search and half of them as streams. A tenth goes away at a random moment,
and a twentieth is hostile. Once the server has a place for every client, once for a third of them. Every answer must be
that of ``answer_batch``, and at the end the server must hold nothing.

``throughput`` asks the same questions of the server, all at once, and of ``answer_batch`` in this process. Both take
turns. Figures are medians, and the ratio is the server's speed over that of ``answer_batch``. First come as many mixed
requests as ``load`` has clients. ``answer_batch`` takes them search by search. A third way, "together", starts them all
on one engine in this process, which is the most that a server in Python could reach. Then come the questions of one
search at a time.

``memory`` sends many requests, and reads the resident memory of the server after each hundred, once it is idle.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_batch import ask
from bench_search import environment
from timing import MAX_GROWTH, Results, growth, memory_bytes

from llava_cot import SwiresGenerator

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.load import MAX_NEW_TOKENS, SEARCHES, Ask, asks, faults, hostile_bodies, load, read, twins
from helpers.serving import Served, serving, world

PARTS = ("load", "throughput", "memory")
LEAVING, HOSTILE = 10, 20  # one of so many clients
LEAST_RATIO = 0.9
SHORT = ("greedy", "sample", "best_of_n")  # whose searches take a few tens of ms
AT_ONCE, EVERY = 50, 100  # requests


def bench_load(generator: SwiresGenerator, clients: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each size of the queue. ``missed`` names what is not as it must be."""
    leaving, hostile = clients // LEAVING, clients // HOSTILE
    requests = asks(clients - hostile, seed)
    expected, rows = twins(generator, requests), []
    print(f"| places | answered | gone | hostile | 429 | seconds |\n|{' --- |' * 6}")
    for places in (clients, clients // 3):
        with serving("--limit", f"max_queue={places}") as served:
            start = time.perf_counter()
            outcome = asyncio.run(load(served.url, requests, leaving, hostile_bodies(hostile, seed), seed))
            seconds = time.perf_counter() - start
            served.assert_nothing_held()
            tracebacks = sum("Traceback" in line for line in served.lines)
        missed = faults(outcome, requests, expected) + [f"the log has {tracebacks} tracebacks"] * bool(tracebacks)
        row: dict[str, Any] = {"part": "load", "clients": clients, "places": places, "seconds": seconds}
        row |= {"answered": len(outcome.replies), "gone": outcome.gone, "refused": dict(outcome.refused)}
        rows.append(row | {"waited": outcome.waited, "missed": missed})
        refused = ", ".join(f"{count}x {status}" for status, count in sorted(outcome.refused.items()))
        cells = [places, len(outcome.replies), outcome.gone, refused, outcome.waited, f"{seconds:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return rows


def in_turns(
    calls: dict[str, Callable[[], Any]], turns: int, look: Callable[[str, Any], None] = lambda name, found: None
) -> dict[str, list[float]]:
    """Return the seconds of each call in every turn but the first, the warm-up; ``look`` sees what a call returned."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            found = call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            look(name, found)
    return seconds


def bench_mixed(generator: SwiresGenerator, served: Served, clients: int, turns: int) -> dict[str, Any]:
    """Return the row of many mixed requests, half of them as streams."""
    requests = [replace(request, seed=0) for request in asks(clients)]
    searches = dict.fromkeys(request.search for request in requests)
    settings = {"seed": 0, "max_new_tokens": MAX_NEW_TOKENS}

    def by_server() -> None:
        outcome = asyncio.run(load(served.url, requests))
        assert len(outcome.replies) == clients

    def by_batch() -> None:
        for search in searches:
            samples = [world(request.question) for request in requests if request.search == search]
            ask(generator, samples, search, **settings)

    async def answer_all() -> None:
        samples = [(world(request.question), request.search) for request in requests]
        await asyncio.gather(*(generator.aio.answer(s.image, s.question, search, **settings) for s, search in samples))

    calls: dict[str, Callable[[], None]] = {
        "server": by_server, "batch": by_batch, "together": lambda: asyncio.run(answer_all())
    }  # fmt: skip
    seconds = in_turns(calls, turns)
    server, batch, together = (statistics.median(seconds[name]) for name in calls)
    print(
        f"| {clients} mixed | half | {server:.2f} | {batch:.2f} | {together:.2f} | {batch / server:.2f} |", flush=True
    )
    row = {"part": "throughput", "search": "mixed", "questions": clients, "seconds": seconds}
    return row | {"server": server, "batch": batch, "together": together, "ratio": batch / server}


def bench_throughput(
    generator: SwiresGenerator, served: Served, search: str, questions: int, turns: int, stream: bool
) -> dict[str, Any]:
    """Return the row of one search."""
    requests = [Ask(at, search, 0, stream) for at in range(questions)]
    samples = [world(at) for at in range(questions)]

    def by_server() -> list[Any]:
        outcome = asyncio.run(load(served.url, requests))
        return [outcome.replies[at] for at in range(questions)]

    def by_batch() -> list[Any]:
        return ask(generator, samples, search, max_new_tokens=MAX_NEW_TOKENS)

    calls: dict[str, Callable[[], list[Any]]] = {"server": by_server, "batch": by_batch}
    drawn: dict[str, list[int]] = {}

    def look(name: str, found: list[Any]) -> None:
        drawn[name] = [read(each)[0].drawn if name == "server" else each.usage.generated_tokens for each in found]
        if name == "batch" and drawn["server"] != drawn["batch"]:
            raise SystemExit(f"{search}: the server draws other tokens than answer_batch")

    seconds = in_turns(calls, turns, look)
    server, batch = (statistics.median(seconds[name]) for name in calls)
    row = {
        "part": "throughput",
        "search": search,
        "stream": stream,
        "questions": questions,
        "tokens": sum(drawn["server"]),
    }
    row |= {"seconds": seconds, "server": server, "batch": batch, "ratio": batch / server}
    way = "all" if stream else "none"
    print(
        f"| {search} | {way} | {server:.2f} | {batch:.2f} |  | {batch / server:.2f} |",
        flush=True,
    )
    return row


def bench_memory(served: Served, requests: int) -> dict[str, Any]:
    """Return the row of the server's memory."""
    sizes = [memory_bytes("VmRSS", served.process.pid)]
    print(f"| requests | resident MiB |\n| --- | --- |\n| 0 | {sizes[0] / 2**20:.1f} |")
    for start in range(0, requests, EVERY):
        for part in range(start, start + EVERY, AT_ONCE):
            outcome = asyncio.run(load(served.url, asks(AT_ONCE, part, SHORT), AT_ONCE // LEAVING, (), part))
            assert len(outcome.replies) + outcome.gone == AT_ONCE
        served.assert_nothing_held()
        sizes.append(memory_bytes("VmRSS", served.process.pid))
        print(f"| {start + EVERY} | {sizes[-1] / 2**20:.1f} |", flush=True)
    row = {"part": "memory", "requests": requests, "every": EVERY, "resident_bytes": sizes}
    return {**row, "growth": growth(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--clients", type=int, default=200, help="of the load")
    parser.add_argument("--questions", type=int, default=64, help="asked at once to measure the throughput")
    parser.add_argument("--searches", nargs="*", choices=SEARCHES, default=("greedy", "best_of_n", "swires"))
    parser.add_argument("--turns", type=int, default=5, help="that server and batch take; medians are shown")
    parser.add_argument("--requests", type=int, default=2000, help="while the memory is read")
    parser.add_argument("--seed", type=int, default=0, help="of who asks what, and of who goes when")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = SwiresGenerator.from_pretrained("tiny")
    results = Results(args.json, benchmark="bench_serve", **environment(args.threads, "cpu"), seed=args.seed)
    missed: list[str] = []
    if "load" in args.parts:
        for row in bench_load(generator, args.clients, args.seed):
            results.add(row)
            missed += row["missed"]
    if "throughput" in args.parts:
        print(f"\n| search | stream | server, s | batch, s | together, s | ratio |\n|{' --- |' * 6}")
        with serving("--limit", f"max_queue={max(args.clients, args.questions)}") as served:
            row = bench_mixed(generator, served, args.clients, args.turns)
            results.add(row)
            if row["ratio"] < LEAST_RATIO:
                missed.append(f"mixed requests have {row['ratio']:.2f} of the throughput of answer_batch")
            for search in args.searches:
                for stream in (False, True):
                    row = bench_throughput(generator, served, search, args.questions, args.turns, stream)
                    results.add(row)
                    if row["ratio"] < LEAST_RATIO:
                        missed.append(f"{search} has {row['ratio']:.2f} of the throughput of answer_batch")
    if "memory" in args.parts:
        print()
        with serving() as served:
            row = bench_memory(served, args.requests)
        results.add(row)
        print(f"\nThe memory grew by {row['growth']:.2%} after a quarter of the requests.")
        if row["growth"] > MAX_GROWTH:
            missed.append(f"the memory grew by {row['growth']:.2%}")
    for line in missed:
        print(f"target missed: {line}")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
