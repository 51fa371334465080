"""Write the shapes world to files in LLaVA-CoT-100k's layout: ``python -m llava_cot.data.world OUT --seeds A:B``."""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from llava_cot.atomic import check_output_folder
from llava_cot.data import shapes
from llava_cot.data.jsonl import write_jsonl
from llava_cot.data.variants import VARIANTS
from llava_cot.stages import render

PER_FOLDER = 1000  # images per folder


def write_world(out: Path | str, seeds: range, variant: str = "full", processes: int = 1) -> int:
    """Write ``out/train.jsonl`` and its images ``out/images/THOUSANDS/SEED.png``, and return the number of rows.

    The same seeds make the same files. The jsonl appears when all its images are written.

    Args:
        seeds: seeds of ``shapes.sample``, all below ``shapes.TEST_SEEDS``.
        variant: one of ``llava_cot.data.variants.VARIANTS``.
        processes: the number of processes that draw the images.

    Raises:
        ValueError: there are no seeds, a seed is negative or in the test range, the variant is unknown, or processes <
            1.
    """
    if not seeds or seeds.step != 1 or seeds.start < 0:
        raise ValueError(f"seeds must be A:B with 0 <= A < B, got {seeds.start}:{seeds.stop}")
    if seeds.stop > shapes.TEST_SEEDS.start:
        kept = shapes.TEST_SEEDS.start
        raise ValueError(f"seeds must end at {kept}, where the test seeds begin, got {seeds.start}:{seeds.stop}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {list(VARIANTS)}, got {variant!r}")
    if processes < 1:
        raise ValueError(f"processes must be >= 1, got {processes}")
    out = Path(out)
    check_output_folder(out, "out")
    for thousand in range(seeds.start // PER_FOLDER, (seeds.stop - 1) // PER_FOLDER + 1):
        (out / "images" / str(thousand)).mkdir(parents=True, exist_ok=True)

    def rows(drawn: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in track(drawn, "images", len(seeds), console=Console(stderr=True), transient=True):
            yield from VARIANTS[variant](row)

    draw = partial(_draw, out)
    if processes == 1:
        return write_jsonl(rows(map(draw, seeds)), out / "train.jsonl")
    with ProcessPoolExecutor(processes) as pool:
        return write_jsonl(rows(pool.map(draw, seeds, chunksize=500)), out / "train.jsonl")


def world_row(seed: int) -> dict[str, Any]:
    """Return the row of ``shapes.sample(seed)`` without writing its image."""
    return _row(seed, shapes.sample(seed))


def _row(seed: int, sample: shapes.Sample) -> dict[str, Any]:
    turns = [{"from": "human", "value": sample.question}, {"from": "gpt", "value": render(sample.stages)}]
    return {"id": f"shapes-{seed}", "image": f"images/{seed // PER_FOLDER}/{seed}.png", "conversations": turns}


def _draw(out: Path, seed: int) -> dict[str, Any]:
    sample = shapes.sample(seed)
    row = _row(seed, sample)
    sample.image.save(out / row["image"], compress_level=1)  # its noise cannot be compressed
    return row


def _seeds(text: str) -> range:
    start, _, stop = text.partition(":")
    try:
        return range(int(start), int(stop))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A:B, got {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for train.jsonl and images/")
    parser.add_argument("--seeds", type=_seeds, required=True, metavar="A:B", help="seeds of the samples, without B")
    parser.add_argument("--variant", default="full", choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    try:
        count = write_world(args.out, args.seeds, args.variant, args.processes)
    except ValueError as error:
        parser.error(str(error))
    print(f"{count} rows in {args.out / 'train.jsonl'}")


if __name__ == "__main__":
    main()
