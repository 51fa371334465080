"""Lay out models x searches on the bundled world as the paper's tables: ``python benchmarks/world_table.py OUT``.

Every model answers the same held-out questions with every search, by ``llava-cot evaluate`` in ``OUT/MODEL-SEARCH``.
Then ``llava-cot tables`` lays them out. A run that is there already goes on or is kept, so the same command goes on
where it was stopped. Name the models of the ablation by their folders (``make ablation`` trains them):

    python benchmarks/world_table.py build/world_table --models build/ablation/*-0/model tiny tiny-qwen

Scores are the bundled verifier's, which was trained on the tiny model's answers. All are scale models, so nothing here
says how good the 11B model is.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from llava_cot.bundled import BUNDLED
from llava_cot.evaluate.command import Request, evaluate_benchmark
from llava_cot.evaluate.pages.tables_page import to_markdown
from llava_cot.evaluate.tables import make_tables, read_entry

SAMPLING = {"temperature": 1.0, "top_p": 1.0}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "token_beam": {"settings": {"num_beams": 4}},
    "best_of_n": {"settings": {"n": 4, **SAMPLING}, "scorer": "verifier"},
    "stage_beam": {"settings": SAMPLING, "scorer": "verifier"},
    "swires:published": {"settings": {"cutoff": 0.0, **SAMPLING}, "scorer": "verifier"},
}
MAX_NEW_TOKENS = 200


def name_of(model: str) -> str:
    """Return a short name: that of a bundled model, or of the folder that a model stands in."""
    return model if model in BUNDLED else re.sub(r"\W+", "-", Path(model).resolve().parent.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the run folders")
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-qwen"], help="bundled names or folders")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--workers", default="local", help="local, or ray:N")
    parser.add_argument("--json", type=Path, help="write the tables to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model is slower on several
    runs = []
    for model in args.models:
        for search in args.searches:
            runs.append(args.out / f"{name_of(model)}-{search.replace(':', '-')}")
            evaluate_benchmark(
                Request(
                    benchmark="world",
                    out=runs[-1],
                    model=model,
                    search=search,
                    limit=args.questions,
                    max_new_tokens=MAX_NEW_TOKENS,
                    workers=args.workers,
                    traces="none",
                    **SEARCHES[search],
                )
            )
    found = make_tables([read_entry(run) for run in runs])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(found))


if __name__ == "__main__":
    main()
