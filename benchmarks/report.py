"""The command that turns recorded results into tables and plots, into docs/performance.md, or into a summary.

Usage: python -m benchmarks.report [--out DIR] [--no-plots] [--page PATH | --summary]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness, performance

RELOPS_COLOR, PEER_COLORS = "#1f5f99", ("#e08a3c", "#7a7a7a", "#5f9e6e", "#a8557d")


def describe(row: dict[str, Any]) -> str:
    dtype = harness.SHORT_DTYPES.get(row["dtype"], row["dtype"])
    return f"{row['shape']}, {dtype}, {harness.SHORT_DIRECTIONS[row['direction']]}"


def machine_line(record: dict[str, Any]) -> str:
    """Return a line that describes the machine, the versions and the commits of a record."""
    run = record["runs"][max(record["runs"])]
    if "gpu" in run["machine"]:
        machine = f"{run['machine']['gpu']}, CUDA {run['versions']['cuda']}"
    else:
        machine = f"{run['machine']['cpu']}, {run['threads']} threads, {run['cpu_isa']}"
    commits = sorted({performance.commit_of(run) for run in record["runs"].values()})
    return f"{machine}, torch {run['versions']['torch']}, {run['date'][:10]}, commit {', '.join(commits)}"


def with_target(ratio: float, target: float | None) -> str:
    if target is None:
        return harness.format_ratio(ratio)
    return f"{harness.format_ratio(ratio)}, {'target' if ratio >= target else 'MISSED:'} {target:g}x"


def markdown(record: dict[str, Any]) -> str:
    """Return the rows of a record as a Markdown table that shows the targets of the project."""
    lines = [
        "| op | shape | dtype | pass | relops | PyTorch | ratio | others (ratio) | peak memory | error | of limit |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        ms, peak = row["ms"], row["peak_bytes"]
        ratio = with_target(row["ratio"], row["target"])
        targets = row.get("peer_targets", {})  # older rows do not have this key
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


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is needed for plots: pip install 'relops[bench]' (or use --no-plots)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def label_ratio_axis(axes: Any, left: float, right: float) -> None:
    """Make the x axis logarithmic, with a line at 1. `right` leaves room for the labels of the bars."""
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a bar for relops and for each peer.

    The length of a bar shows, on a log scale, how many times faster than PyTorch the contender is.
    """
    pyplot = load_pyplot()
    rows = record["rows"]
    # A variant of relops (deterministic, unfused) is not a competitor, so only the table shows its ratio.
    peers = sorted({name for row in rows for name in row["peer_ratio"] if not name.startswith("relops")})
    bars: list[tuple[float, float, str]] = []  # (y, times faster than PyTorch, contender)
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
    for contender, color in colors.items():
        own_bars = [(height, times) for height, times, name in bars if name == contender]
        heights, times = zip(*own_bars)
        drawn = axes.barh(heights, times, height=0.9, color=color, label=contender)
        axes.bar_label(drawn, [harness.format_ratio(x) for x in times], padding=3, fontsize=8)
    for height, target in targets:
        axes.plot([target, target], [height - 0.45, height + 0.45], color="black", linewidth=2)
    values = [times for _, times, _ in bars]
    label_ratio_axis(axes, min(0.5, 0.7 * min(values)), 2 * max(values))
    axes.set_yticks([height for height, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_ylim(y, -1)
    axes.set_xlabel("times faster than pure PyTorch in the same run" + (" (black mark: target)" if targets else ""))
    axes.set_title(f"{path.stem}\n{machine_line(record)}", fontsize=9, loc="left")
    if peers:
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_summary(results: Path, path: Path) -> None:
    """Draw, for each row of the summary, how many times faster relops is than PyTorch and than a peer."""
    pyplot = load_pyplot()
    rows = performance.summary_rows(results)
    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    ticks, values = [], []
    for i, (selected, row) in enumerate(rows):
        peer = performance.summary_peer(row)
        bars = [(row["ratio"], RELOPS_COLOR, "PyTorch")]
        if peer is not None:
            bars.append((peer[1], PEER_COLORS[0], peer[0]))
        for j, (ratio, color, name) in enumerate(bars):
            drawn = axes.barh(i + 0.38 * j - 0.19 * (len(bars) - 1), ratio, height=0.36, color=color)
            axes.bar_label(drawn, [f"{performance.format_ratio(ratio)} ({name})"], padding=3, fontsize=8)
            values.append(ratio)
        ticks.append(f"{selected.op}, {selected.direction}\n{selected.description}")
    label_ratio_axis(axes, min(1, 0.7 * min(values)), 4 * max(values))
    axes.set_yticks(range(len(rows)), ticks, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("speed-up of relops on two CPU cores, float32")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (RELOPS_COLOR, PEER_COLORS[0])]
    axes.legend(handles, ["against pure PyTorch", "against another implementation"], loc="upper right", fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_page(results: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(performance.page(results))
    print(f"wrote {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Print the recorded results as tables, save a plot of each record next to its file, and write"
        " docs/performance.md with its chart.",
    )
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="the folder that contains the results")
    parser.add_argument("--no-plots", action="store_true", help="do not draw plots")
    parser.add_argument(
        "--page", type=Path, metavar="PATH", help="write the performance page to this file, and do nothing else"
    )
    parser.add_argument("--summary", action="store_true", help="print the table for the README, and do nothing else")
    options = parser.parse_args(argv)
    if options.summary:
        print(performance.summary(options.out), end="")
        return 0
    if options.page is not None:
        write_page(options.out, options.page)
        return 0

    paths = sorted(options.out.glob("*/*.json"))
    if not paths:
        print(f"{options.out} has no records. To create them, run: python -m benchmarks.run", file=sys.stderr)
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
    if options.out == harness.RESULTS:
        if not options.no_plots:
            performance.IMAGES.mkdir(parents=True, exist_ok=True)
            plot_summary(options.out, performance.IMAGES / "op_speedups.png")
        write_page(options.out, performance.PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
