"""Writes the table of docs/kernels.md from the committed results: ``python benchmarks/kernels_table.py [--check]``."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- from benchmarks/kernels_table.py -->\n", "<!-- end -->\n"
STEMS = ("paged_kv", "attention", "sampling", "logprob")
OURS = ("native", "triton", "reference")
HEADER = ["op", "case", "on", *OURS, "share of copy bandwidth", "peers: their time over that of the kernel"]


def table(results: Path) -> str:
    lines = [f"| {' | '.join(HEADER)} |", "| " + " | ".join(["---"] * len(HEADER)) + " |"]
    machines = []
    for device in ("cpu", "cuda"):
        found = [results / f"{stem}_{device}.json" for stem in STEMS]
        for path in filter(Path.exists, found):
            report = json.loads(path.read_text())
            machines.append(f"{device}: {report['machine']}, copy bandwidth {report['copy_bandwidth'] / 1e9:.0f} GB/s")
            lines += [_row(row, device, report["copy_bandwidth"]) for row in report["rows"]]
    unique = dict.fromkeys(line.split(", copy")[0] for line in machines)
    lines += ["", "Milliseconds, medians. " + "; ".join(unique) + "."]
    for path in sorted(results.glob("logprob_memory_*.json")):
        report = json.loads(path.read_text())
        providers = list(report["rows"][0]["extra_bytes"])
        lines += ["", f"Peak memory beyond inputs and results, MiB ({report['machine']}):", ""]
        lines += [f"| `linear_logprobs` | {' | '.join(providers)} |", "| --- |" + " --- |" * len(providers)]
        for row in report["rows"]:
            extra = [f"{row['extra_bytes'][name] / 2**20:.0f}" for name in providers]
            lines.append(f"| {row['case']} | {' | '.join(extra)} |")
    return "\n".join(lines) + "\n"


def _row(row: dict, device: str, bandwidth: float) -> str:
    medians = {name: figures["median"] for name, figures in row["ms"].items()}
    ours = {name: ms for name, ms in medians.items() if name.split(",")[0] in OURS}
    backends = {kind: min((ms for name, ms in ours.items() if name.startswith(kind)), default=None) for kind in OURS}
    best = min(ms for kind, ms in backends.items() if ms is not None and kind != "reference")
    others = {name: ms / best for name, ms in medians.items() if name not in ours or name == "reference"}
    peers = [f"{name} {_ratio(ratio, 'alone' not in name)}" for name, ratio in others.items()]
    share = f"{row['bytes'] / (best / 1e3) / bandwidth:.0%}" if row["bytes"] else ""
    cells = [f"`{row['op']}`", row["case"], device, *map(_ms, backends.values()), share, ", ".join(peers)]
    return f"| {' | '.join(cells)} |"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(value: float, is_peer: bool) -> str:
    """A yardstick, "... alone", does only a part of the work and wins nothing."""
    shown = f"{value:.2f}x" if value < 1 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"
    return f"**{shown}, the peer wins**" if value < 1 and is_peer else shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if docs/kernels.md has another table")
    args = parser.parse_args()
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = before + BEGIN + table(ROOT / "benchmarks" / "results") + END + after
    if args.check:
        sys.exit(written != text)
    DOCS.write_text(written)


if __name__ == "__main__":
    main()
