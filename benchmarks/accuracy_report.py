"""Make the tables and the plot of what ``bench_accuracy.py`` measured: ``python benchmarks/accuracy_report.py RAW``.

It prints the tables and writes two files. ``benchmarks/results/tiny_accuracy.json`` has the outcome of each question in
every row, so any two rows can be compared in pairs. ``docs/tiny_accuracy.svg`` is the plot. Of the second bundled model
there is no plot, and the results are in ``tiny_qwen_accuracy.json``. Intervals are Wilson's 95 % intervals. The exact
McNemar test compares two searches of the same questions.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from llava_cot import tiny_path
from llava_cot.bundled import BUNDLED
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.evaluate.statistics import mcnemar, wilson
from llava_cot.scoring import Span, diagnose, self_consistency, vote
from llava_cot.stages import parse
from llava_cot.text import normalise

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parent.parent / "docs" / "tiny_accuracy.svg"


def row(right: list[bool], tokens: list[float], scorer_calls: float = 0.0, **more: Any) -> dict[str, Any]:
    n = len(right)
    low, high = wilson(sum(right), n)
    return {
        "accuracy": sum(right) / n,
        "interval95": [round(low, 4), round(high, 4)],
        "tokens": round(sum(tokens) / n, 1),
        "scorer_calls": round(scorer_calls, 2),
        **more,
        "right": "".join(str(int(r)) for r in right),
    }


def paired(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int, float]:
    """Return how many questions only the one and only the other has right, and the exact two-sided p-value."""
    only = Counter(zip(one["right"], other["right"]))
    won, lost = only["1", "0"], only["0", "1"]
    return won, lost, mcnemar(won, lost)


def _answers(question: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "said": normalise(parse(text)["CONCLUSION"].text),
            "closed": closed,
            "right": right,
            "tokens": tokens,
            "scores": {name: values[at] for name, values in question["scores"].items()},
        }
        for at, (text, closed, right, tokens) in enumerate(
            zip(question["text"], question["closed"], question["right"], question["tokens"])
        )
    ]


def _spans(answers: list[dict[str, Any]]) -> list[Span]:
    return [Span(a["text"], [0], [a["scores"]["confidence"]], [0.0], closed=a["closed"]) for a in answers]


def _most(answers: list[dict[str, Any]], weight) -> dict[str, Any]:
    votes: dict[str, float] = {}
    for answer in answers:
        votes[answer["said"]] = votes.get(answer["said"], 0.0) + weight(answer)
    said = max(votes, key=lambda key: votes[key])
    return next(answer for answer in answers if answer["said"] == said)


def choices(scorers: list[str]) -> dict[str, Any]:
    """Return functions, by name, that choose an answer from the first k of a pool."""

    def by(name):
        return lambda answers: max(answers, key=lambda a: (a["closed"], a["scores"][name]))

    def by_pool(scorer):
        return lambda answers: max(zip(scorer(_spans(answers)), [-at for at in range(len(answers))], answers))[2]

    found = {f"best of N, {name}": by(name) for name in scorers}
    found["best of N, self_consistency"] = by_pool(self_consistency)
    found["majority vote"] = lambda answers: _most(answers, lambda a: 1.0)
    found["confidence-weighted vote"] = by_pool(vote)
    found["verifier-weighted vote"] = lambda answers: _most(
        answers, lambda a: 1 / (1 + math.exp(-a["scores"]["verifier"]))
    )
    return found


def pool_rows(pool: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    questions = [_answers(question) for question in pool]
    rows = {}
    for name, choose in choices(list(pool[0]["scores"])).items():
        for k in (size for size in SIZES if size <= len(pool[0]["text"])):
            chosen = [choose(answers[:k])["right"] for answers in questions]
            tokens = [sum(a["tokens"] for a in answers[:k]) for answers in questions]
            rows[f"{name.replace('of N', f'of {k}')}" + (f" of {k}" if "vote" in name else "")] = row(chosen, tokens, k)
    return rows


def diagnoses(pool: list[dict[str, Any]], greedy: float) -> dict[str, dict[str, Any]]:
    found = {}
    for name in pool[0]["scores"]:
        d = diagnose([q["scores"][name] for q in pool], [q["right"] for q in pool], greedy=greedy)
        found[name] = {"auc": d.auc, "realised": d.realised, "verdict": d.verdict}
    return found


def same_tokens(rows: dict[str, dict[str, Any]], tokens: float, names: list[str]) -> str:
    """Return the smallest of these rows that had at least so many tokens, or the largest row."""
    enough = [name for name in names if rows[name]["tokens"] >= tokens]
    return min(enough or names, key=lambda name: rows[name]["tokens"] if enough else -rows[name]["tokens"])


def comparisons(rows: dict[str, dict[str, Any]], search: str) -> list[dict[str, Any]]:
    """Compare a search with every rival that had at least as many tokens."""
    tokens = rows[search]["tokens"]
    families = {
        "greedy": ["greedy"],
        "token beam": [n for n in rows if n.startswith("token beam")],
        "majority vote": [n for n in rows if n.startswith("majority")],
        "best of N, verifier": [n for n in rows if n.startswith("best of") and n.endswith(", verifier")],
        "verifier-weighted vote": [n for n in rows if n.startswith("verifier-weighted")],
        "sentence beam, verifier": ["sentence beam, verifier"],
        "stage beam, verifier": ["stage beam, verifier"],
    }
    found = []
    for names in filter(None, ([name for name in names if name in rows] for names in families.values())):
        rival = same_tokens(rows, tokens, names)
        won, lost, p = paired(rows[search], rows[rival])
        found.append({"search": search, "rival": rival, "won": won, "lost": lost, "p": p})
    return found


def print_tables(data: dict[str, Any]) -> None:
    rows = data["rows"]
    print("| search | accuracy | 95 % interval | generated tokens | scorer calls | retraces |")
    print("| --- | --- | --- | --- | --- | --- |")
    shown = [name for name in rows if not name.startswith(("best of", "majority", "confidence-", "verifier-"))]
    shown += [
        n for n in rows if n.split(",")[0] in ("best of 4", "best of 16") or n.endswith(("vote of 4", "vote of 16"))
    ]
    for name in shown:
        r = rows[name]
        low, high = r["interval95"]
        cells = [
            name,
            f"{r['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{r['tokens']:.0f}",
            f"{r['scorer_calls']:.1f}",
        ]
        print("| " + " | ".join([*cells, f"{r['retraces']:.2f}" if "retraces" in r else "-"]) + " |")
    print("\n| search | against | tokens | wins | losses | p |\n| --- | --- | --- | --- | --- | --- |")
    for c in data["comparisons"]:
        tokens = f"{rows[c['search']]['tokens']:.0f} : {rows[c['rival']]['tokens']:.0f}"
        print(f"| {c['search']} | {c['rival']} | {tokens} | {c['won']} | {c['lost']} | {c['p']:.1g} |")
    print("\n| scorer | AUC within a question | realised headroom | verdict |\n| --- | --- | --- | --- |")
    for name, d in data["diagnoses"].items():
        print(f"| {name} | {d['auc']:.2f} | {d['realised']:.0%} | {d['verdict']} |")


def plot(rows: dict[str, dict[str, Any]], free: str, path: Path) -> None:
    """Draw the plot. ``free`` is the scorer that represents those without a second model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llava-cot"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, 5))

    def points(names, label, **style):
        values = [rows[name] for name in names]
        x, y = [v["tokens"] for v in values], [100 * v["accuracy"] for v in values]
        low = [100 * (v["accuracy"] - v["interval95"][0]) for v in values]
        high = [100 * (v["interval95"][1] - v["accuracy"]) for v in values]
        axes.errorbar(x, y, yerr=[low, high], label=label, capsize=2, **style)

    def curve(prefix, suffix):
        return [f"{prefix} {k}{suffix}" for k in SIZES]

    points(curve("best of", ", oracle"), "any of N right", color="0.7", ls="--", marker=".")
    points(curve("best of", ", verifier"), "best of N, verifier", color="tab:blue", marker="o", ms=4)
    points(curve("majority vote of", ""), "majority vote", color="tab:green", marker="o", ms=4)
    points(curve("best of", f", {free}"), f"best of N, {free}", color="tab:cyan", marker="o", ms=4)
    points([n for n in rows if n.startswith("token beam")], "token beam", color="tab:brown", marker="v", ms=5)
    points(["greedy"], "greedy", color="black", marker="s", ls="", ms=5)
    for name, marker in (("sentence beam", "P"), ("stage beam", "D")):
        points([f"{name}, verifier"], f"{name}, verifier", color="tab:purple", marker=marker, ls="", ms=6)
    for name, marker in (("SWIRES, published", "^"), ("SWIRES, reasoning", "*")):
        points([f"{name}, verifier"], f"{name}, verifier", color="tab:red", marker=marker, ls="", ms=9)
        points([f"{name}, {free}"], f"{name}, {free}", color="tab:orange", marker=marker, ls="", ms=9)
    axes.set(xscale="log", xlabel="generated tokens per question", ylabel="right, %")
    axes.set_xticks([80, 160, 320, 640, 1280], labels=["80", "160", "320", "640", "1,280"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set_title("Tiny model, shapes world, held-out questions, 95 % intervals", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="the file that bench_accuracy.py wrote")
    raw = json.loads(parser.parse_args().raw.read_text())
    model = raw.get("model", "tiny")
    for name, folder in (("model", BUNDLED[model]()), ("verifier", tiny_path() / "verifier")):
        if raw[f"{name}_sha256"] != (own := checkpoint_sha256(folder)):
            raise SystemExit(f"raw must be of the bundled {name}, {own}, got {raw[f'{name}_sha256']}")
    rows = {}
    for name, columns in raw["searches"].items():
        mean = {key: sum(columns[key]) / len(columns[key]) for key in ("scorer_calls", "prompt_tokens", "retraces")}
        rows[name] = row(columns["right"], columns["tokens"], **mean)
    rows |= pool_rows(raw["pool"])
    data = {key: value for key, value in raw.items() if key not in ("searches", "pool")} | {
        "rows": rows,
        "comparisons": [
            c
            for name in rows
            if name.startswith("SWIRES") and name.endswith("verifier")
            for c in comparisons(rows, name)
        ],
        "diagnoses": diagnoses(raw["pool"], rows["greedy"]["accuracy"]),
    }
    (RESULTS / f"{model.replace('-', '_')}_accuracy.json").write_text(json.dumps(data, indent=1) + "\n")
    if model == "tiny":
        plot(rows, next(name for name in raw["scorers"] if name != "verifier"), PLOT)
    print_tables(data)


if __name__ == "__main__":
    main()
