"""Report an ablation of the small world as a table: ``python benchmarks/ablation_report.py OUT``.

It writes ``benchmarks/results/tiny_ablation.json``, with the outcome of every question, and prints the table in
Markdown. The interval of a seed is Wilson's 95 % interval: it shows what other questions would change. The standard
deviation over seeds shows what another training run would change. p-values are from the exact McNemar test on the same
questions and seed.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from accuracy_report import paired

from llava_cot.evaluate import published
from llava_cot.evaluate.published import PUBLISHED
from llava_cot.evaluate.statistics import wilson

RESULTS = Path(__file__).parent / "results" / "tiny_ablation.json"
FULL = "full"

# MMStar, MathVista and AI2D in the summary that this project started from. Its rows of left-out stages are in no
# version of the paper that was found. Its direct answers are the paper's base without any fine-tune.
NAMES = {"all four stages": FULL, "direct answer": "direct"}
SUMMARY = {
    NAMES.get(row.model, row.model): " / ".join(map(str, row.numbers.values()))
    for row in PUBLISHED
    if row.table == "stages" and row.source is published.SUMMARY
}
# Version 6 of the paper, arXiv:2411.10440: the mean of six benchmarks, and the mean of their reasoning subsets.
PAPER = {
    "base": ("56.6", "56.9"),
    "full": ("62.4", "63.1"),
    "without tags": ("60.9", ""),
    "shuffled order": ("", "58.2"),
    "direct": ("59.0", ""),
    "apart": ("", "57.7"),
}


def seed_row(run: dict[str, Any]) -> dict[str, Any]:
    right, n = run["right"].count("1"), len(run["right"])
    return {"accuracy": right / n, "interval95": [round(bound, 4) for bound in wilson(right, n)], **run}


def against(rows: dict[str, dict[str, Any]], variant: str, rival: str) -> list[float]:
    """Return the p-value of each seed that both have."""
    one, other = rows[variant]["seeds"], rows[rival]["seeds"]
    return [paired(one[seed], other[seed])[2] for seed in one if seed in other]


def summarise(raw: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for variant, runs in raw["rows"].items():
        seeds = {seed: seed_row(run) for seed, run in runs.items()}
        accuracies = [row["accuracy"] for row in seeds.values()]
        rows[variant] = {
            "mean": fmean(accuracies),
            "std": stdev(accuracies) if len(accuracies) > 1 else None,
            "tokens": fmean(row["tokens"] for row in seeds.values()),
            "seeds": seeds,
        }
    if FULL in rows:
        for variant in rows:
            rows[variant]["p"] = [] if variant in (FULL, "base") else against(rows, variant, FULL)
    return {**raw, "rows": rows}


def print_table(data: dict[str, Any]) -> None:
    names = sorted({seed for row in data["rows"].values() for seed in row["seeds"]}, key=int)
    heads = ["trained on", "accuracy", *(f"seed {name} (95 % interval)" for name in names), "p against full", "tokens"]
    heads += ["summary: MMStar / MathVista / AI2D", "paper v6, all", "paper v6, reasoning"]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for variant, row in data["rows"].items():
        spread = "" if row["std"] is None else f" +- {100 * row['std']:.1f}"
        cells = [variant, f"{100 * row['mean']:.1f}{spread}"]
        for name in names:
            run = row["seeds"].get(name)
            low, high = run["interval95"] if run else (0, 0)
            cells.append(f"{100 * run['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})" if run else "")
        cells += [", ".join(f"{p:.1g}" for p in row.get("p", [])), f"{row['tokens']:.0f}"]
        cells += [SUMMARY.get(variant, ""), *PAPER.get(variant, ("", ""))]
        print("| " + " | ".join(cells) + " |")
    print("\nThe orders in which stages were opened, if there was more than one:\n")
    for variant, row in data["rows"].items():
        for name, run in row["seeds"].items():
            if len(run["orders"]) > 1:
                shown = ", ".join(f"{order or 'none'}: {count}" for order, count in list(run["orders"].items())[:6])
                print(f"- {variant}, seed {name}: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the ablation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = summarise(json.loads((args.out / "ablation.json").read_text(encoding="utf-8")))
    args.results.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print_table(data)


if __name__ == "__main__":
    main()
