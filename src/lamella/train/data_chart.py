"""The figure of prepared data: lengths, padding, mixture and balance of the first steps."""

import io
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lamella.data.inspect import Look
from lamella.train.plot import BLUE, LINES, RAW, RED, WIDTH, legend

DPI = 150
HEIGHTS = {"lengths": 3.0, "padding": 1.4, "mixture": 2.4, "balance": 2.2}
MOST_SOURCES = len(LINES)


def write(file: Path, name: str, cost: str, look: Look) -> None:
    """Draws into a file that is replaced in one move; its ending tells the format."""
    figure = chart(name, cost, look)
    FigureCanvasAgg(figure)  # whatever MPLBACKEND says, nothing here opens a window
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:], dpi=DPI)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def chart(name: str, cost: str, look: Look) -> Figure:
    """Panels one above the other; the mixture where there are several sources. `cost`: what balance goes by."""
    heights = {k: h for k, h in HEIGHTS.items() if k != "mixture" or len(look.sources) > 1}
    figure = Figure(figsize=(WIDTH, sum(heights.values()) + 0.8), layout="constrained", facecolor="white")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights.values()))
    panels: dict[str, Axes] = dict(zip(heights, grid[:, 0], strict=True))
    figure.suptitle(
        f"{name}: rows of {look.sequence_length:,} tokens, {look.rows_per_step:,} a step", fontweight="bold"
    )
    for axes in panels.values():
        axes.set_axisbelow(True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _lengths(panels["lengths"], look)
    _padding(panels["padding"], look)
    if "mixture" in panels:
        _mixture(panels["mixture"], look)
    _balance(panels["balance"], look)
    steps = [axes for key, axes in panels.items() if key != "lengths"]
    for axes in steps:
        axes.sharex(steps[-1])
        axes.tick_params(labelbottom=axes is steps[-1])
    steps[-1].set_xlabel(f"step   (cost of a row: {cost})")
    steps[-1].set_xlim(-0.5, len(look.padding) - 0.5)
    steps[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _lengths(axes: Axes, look: Look) -> None:
    """Documents filled, tokens as an outline: the few long documents hold many of the tokens."""
    lengths = look.lengths
    documents, tokens = (100 * n / n.sum() for n in (lengths.counts, lengths.tokens))
    axes.stairs(documents, lengths.edges, fill=True, color="#c4c4c4", label="of the documents")
    axes.stairs(documents, lengths.edges, color="#7a7a7a", linewidth=0.8)
    axes.stairs(tokens, lengths.edges, color="black", linewidth=1.8, label="of the tokens")
    name = f"row: {look.sequence_length:,}; longer: {look.packing.cut:.1%} of the documents, cut"
    axes.axvline(look.sequence_length, color=BLUE, linestyle="--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths.edges[0], max(lengths.edges[-1], 1.1 * look.sequence_length))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("tokens of a document, its end included (log scale)")
    axes.set_ylabel("share (%)")
    axes.set_ylim(bottom=0)
    legend(axes)


def _padding(axes: Axes, look: Look) -> None:
    axes.bar(np.arange(len(look.padding)), 100 * look.padding, width=1.0, color="#5f86b3", edgecolor="#1f3a5f", lw=0.3)
    mean = 100 * look.packing.padding
    axes.axhline(mean, color="black", linestyle="--", linewidth=1, label=f"over an epoch: {mean:.3g}%")
    axes.set_ylabel("padding\n(% of slots)")
    axes.set_ylim(0, 1.15 * max(0.01, mean, 100 * float(look.padding.max())))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    legend(axes)


def _mixture(axes: Axes, look: Look) -> None:
    """Drawn as a line a source, planned as a thin one of its kind; of many sources the largest."""
    shares = 100 * look.drawn / look.drawn.sum(axis=1, keepdims=True)
    order = sorted(range(len(look.sources)), key=lambda n: -look.sources[n].planned)
    steps = np.arange(len(shares))
    for n, (colour, style) in zip(order, LINES, strict=False):
        source = look.sources[n]
        label = f"{_short(source.name)}: {source.planned:.1%} planned, {source.drawn:.1%} drawn"
        marker = "o" if len(steps) == 1 else ""
        axes.plot(steps, shares[:, n], color=colour, linestyle=style, linewidth=1.4, marker=marker, label=label)
        axes.axhline(100 * source.planned, color=colour, linewidth=0.7)
    if len(order) > MOST_SOURCES:
        axes.plot([], [], " ", label=f"and {len(order) - MOST_SOURCES} smaller sources")
    axes.set_ylabel("share of the\nstep's tokens (%)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.2, fontsize=9)


def _balance(axes: Axes, look: Look) -> None:
    balance = look.balance
    marker = "o" if len(look.padding) == 1 else ""
    for name, values, colour, style in (
        ("dealt by cost", balance.dealt, "black", "-"),
        ("rows in order", balance.in_order, RED, ":"),
    ):
        label = f"{name}: mean {values.mean():.3f}, worst {values.max():.3f}"
        axes.plot(values, color=colour, linestyle=style, marker=marker, linewidth=1.6, label=label)
    axes.axhline(1, color=RAW, linewidth=1)
    axes.set_ylabel(f"cost of the dearest of\n{balance.ranks} ranks over the mean")
    legend(axes)


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
