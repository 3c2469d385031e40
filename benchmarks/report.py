"""python -m benchmarks.report [--out DIR]: a Markdown table of the recorded runs, and a plot beside each record."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness

RELOPS_COLOR, PEER_COLORS = "#1f5f99", ("#e08a3c", "#7a7a7a", "#5f9e6e", "#a8557d")


def describe(row: dict[str, Any]) -> str:
    dtype = harness.SHORT_DTYPES.get(row["dtype"], row["dtype"])
    return f"{row['shape']}, {dtype}, {harness.SHORT_DIRECTIONS[row['direction']]}"


def machine_line(record: dict[str, Any]) -> str:
    """What the rows ran on; rows of different runs are told apart by their commits."""
    run = record["runs"][max(record["runs"])]
    if "gpu" in run["machine"]:
        where = f"{run['machine']['gpu']}, CUDA {run['versions']['cuda']}"
    else:
        where = f"{run['machine']['cpu']}, {run['threads']} threads, {run['cpu_isa']}"
    commits = sorted({(r["commit"] or "unknown")[:10] + ("+" if r["dirty"] else "") for r in record["runs"].values()})
    return f"{where}, torch {run['versions']['torch']}, {run['date'][:10]}, commit {', '.join(commits)}"


def with_target(ratio: float, target: float | None) -> str:
    if target is None:
        return harness.format_ratio(ratio)
    return f"{harness.format_ratio(ratio)}, {'target' if ratio >= target else 'MISSED:'} {target:g}x"


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "| op | shape | dtype | pass | relops | PyTorch | ratio | others (relops against them) | peak memory | error |"
        " of limit |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        ms, peak = row["ms"], row["peak_bytes"]
        ratio = with_target(row["ratio"], row["target"])
        targets = row.get("peer_targets", {})  # older rows have none
        others = ", ".join(
            f"{name} {harness.format_ms(ms[name]['median'])} ms ({with_target(peer, targets.get(name))})"
            for name, peer in row["peer_ratio"].items()
        )
        fraction = harness.format_fraction(row["fraction_of_limit"]) if "fraction_of_limit" in row else ""
        lines.append(
            f"| {row['op']} | {row['shape']} | {harness.SHORT_DTYPES.get(row['dtype'], row['dtype'])}"
            f" | {harness.SHORT_DIRECTIONS[row['direction']]} | {harness.format_ms(ms['relops']['median'])} ms"
            f" | {harness.format_ms(ms['pytorch']['median'])} ms | {ratio} | {others}"
            f" | {harness.format_bytes(peak['relops'])}iB, PyTorch {harness.format_bytes(peak['pytorch'])}iB"
            f" | {row['error']['relops']:.1e} | {fraction} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """A bar per row: how many times faster than PyTorch relops is, and its peers are, on a logarithmic axis."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "Plots need matplotlib: pip install 'relops[bench]' (or --no-plots for the table alone)"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["rows"]
    # A relops variant (deterministic, unfused) is no rival; its factor is in the table.
    peers = sorted({name for row in rows for name in row["peer_ratio"] if not name.startswith("relops")})
    bars: list[tuple[float, float, str]] = []  # (height, times faster than PyTorch, who)
    ticks: list[tuple[float, str]] = []
    targets: list[tuple[float, float]] = []
    y = 0.0
    for row in rows:
        top = y
        bars.append((y, row["ratio"], "relops"))
        if row["target"] is not None:
            targets.append((y, row["target"]))
        y += 1
        for name in peers:
            if name in row["peer_ratio"]:
                bars.append((y, row["ratio"] / row["peer_ratio"][name], name))
                y += 1
        ticks.append(((top + y - 1) / 2, describe(row)))
        y += 0.6
    colors = {"relops": RELOPS_COLOR} | {name: PEER_COLORS[i % len(PEER_COLORS)] for i, name in enumerate(peers)}

    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.24 * y), layout="constrained")
    for who, color in colors.items():
        mine = [(height, times) for height, times, name in bars if name == who]
        heights, times = zip(*mine)
        drawn = axes.barh(heights, times, height=0.9, color=color, label=who)
        axes.bar_label(drawn, [harness.format_ratio(x) for x in times], padding=3, fontsize=8)
    for height, target in targets:
        axes.plot([target, target], [height - 0.45, height + 0.45], color="black", linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    values = [times for _, times, _ in bars]
    axes.set_xlim(min(0.5, *(0.7 * x for x in values)), 2 * max(values))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_yticks([height for height, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_ylim(y, -1)
    axes.set_xlabel("times faster than pure PyTorch in the same run (black mark: target)")
    axes.set_title(f"{path.stem}\n{machine_line(record)}", fontsize=9, loc="left")
    if peers:
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="the folder of results")
    parser.add_argument("--no-plots", action="store_true", help="only print the table")
    options = parser.parse_args(argv)
    paths = sorted(options.out.glob("*/*.json"))
    if not paths:
        print(f"No records under {options.out}; make them with: python -m benchmarks.run", file=sys.stderr)
        return 1
    machine = None
    for path in paths:
        record = json.loads(path.read_text())
        if machine != path.parent.name:
            machine = path.parent.name
            print(f"\n### {machine_line(record)}\n")
        print(markdown(record) + "\n")
        if not options.no_plots:
            plot(record, path.with_suffix(".png"))
            print(f"wrote {path.with_suffix('.png')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
