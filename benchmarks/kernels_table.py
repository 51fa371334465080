"""Write the table of docs/kernels.md from the committed results: ``python benchmarks/kernels_table.py [--check]``."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- from benchmarks/kernels_table.py -->\n", "<!-- end -->\n"
STEMS = ("paged_kv", "attention", "linear", "sampling", "logprob")
OURS = ("native", "triton", "reference")
PEERS = "peers: their time over that of the kernel"
HEADER = ["op", "case", "on", *OURS, "share of copy bandwidth", PEERS, "AVX2: native, share, the closest peer"]
# The last column is for a CPU without AVX-512. It is empty for cases that were not measured there.


def table(results: Path) -> str:
    lines = [f"| {' | '.join(HEADER)} |", "| " + " | ".join(["---"] * len(HEADER)) + " |"]
    machines = []
    avx2 = {}
    for path in filter(Path.exists, [results / f"{stem}_avx2.json" for stem in STEMS]):
        report = json.loads(path.read_text())
        machines.append(f"AVX2: {report['machine']}, copy bandwidth {report['copy_bandwidth'] / 1e9:.0f} GB/s")
        avx2 |= {(row["op"], row["case"]): _avx2_cell(row, report["copy_bandwidth"]) for row in report["rows"]}
    for device in ("cpu", "cuda"):
        found = [results / f"{stem}_{device}.json" for stem in STEMS]
        for path in filter(Path.exists, found):
            report = json.loads(path.read_text())
            machines.append(f"{device}: {report['machine']}, copy bandwidth {report['copy_bandwidth'] / 1e9:.0f} GB/s")
            others = avx2 if device == "cpu" else {}
            lines += [_row(row, device, report["copy_bandwidth"], others) for row in report["rows"]]
    unique = dict.fromkeys(line.split(", copy")[0] for line in machines)
    lines += ["", "Milliseconds, medians. " + "; ".join(unique) + "."]
    for path in sorted(results.glob("logprob_memory_*.json")):
        report = json.loads(path.read_text())
        providers = list(dict.fromkeys(name for row in report["rows"] for name in row["extra_bytes"]))
        lines += ["", f"Peak memory beyond inputs and results, MiB ({report['machine']}):", ""]
        lines += [f"| `linear_logprobs` | {' | '.join(providers)} |", "| --- |" + " --- |" * len(providers)]
        for row in report["rows"]:
            found = row["extra_bytes"]  # providers that failed are missing
            extra = [f"{found[name] / 2**20:.0f}" if name in found else "" for name in providers]
            lines.append(f"| {row['case']} | {' | '.join(extra)} |")
    return "\n".join(lines) + "\n"


def _row(row: dict, device: str, bandwidth: float, avx2: dict[tuple[str, str], str]) -> str:
    backends, share, others = _figures(row, bandwidth)
    peers = [f"{name} {_ratio(ratio, 'alone' not in name)}" for name, ratio in others.items()]
    cells = [f"`{row['op']}`", row["case"], device, *map(_ms, backends.values()), share, ", ".join(peers)]
    return f"| {' | '.join([*cells, avx2.get((row['op'], row['case']), '')])} |"


def _avx2_cell(row: dict, bandwidth: float) -> str:
    backends, share, others = _figures(row, bandwidth)
    peers = {name: ratio for name, ratio in others.items() if "alone" not in name}
    closest = min(peers, key=peers.__getitem__)
    return ", ".join(filter(None, [_ms(backends["native"]), share, f"{closest} {_ratio(peers[closest], True)}"]))


def _figures(row: dict, bandwidth: float) -> tuple[dict[str, float | None], str, dict[str, float]]:
    """Return the milliseconds of our back ends, the share of copy bandwidth, and each peer's time over our fastest."""
    medians = {name: figures["median"] for name, figures in row["ms"].items()}
    ours = {name: ms for name, ms in medians.items() if name.split(",")[0] in OURS}
    backends = {kind: min((ms for name, ms in ours.items() if name.startswith(kind)), default=None) for kind in OURS}
    best = min(ms for kind, ms in backends.items() if ms is not None and kind != "reference")
    others = {name: ms / best for name, ms in medians.items() if name not in ours or name == "reference"}
    share = f"{row['bytes'] / (best / 1e3) / bandwidth:.0%}" if row["bytes"] else ""
    return backends, share, others


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(value: float, is_peer: bool) -> str:
    """Format a ratio. A yardstick ("... alone") does only a part of the work, so it never wins."""
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
