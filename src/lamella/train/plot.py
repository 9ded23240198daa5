"""What the figures of a run have in common: they read in black and white, and every axis names its unit."""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lamella.train.history import Bins, History, smooth

WIDTH = 8.5  # inches: the default font sizes then read well where a page shows the picture 1000 pixels wide
RAW, BLUE, RED = "#a8a8a8", "#0a4a90", "#c2410c"  # apart from each other in grey as well
LINES = (("#000000", "-"), ("#0a4a90", "--"), ("#c2410c", "-."), ("#2f7d5b", ":"), ("#7a7a7a", "-"), ("#7a7a7a", "--"))
FILLS = (("#f2f2f2", ".."), ("#b9cfe6", ""), ("#5f86b3", "//"), ("#1f3a5f", ""), ("#d9a066", "xx"), ("#ffffff", "++"))
MOST_POINTS = 1500


def over_steps(history: History, title: str, heights: list[float]) -> tuple[Figure, list[Axes]]:
    """Panels one above the other that share the steps."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained", facecolor="white")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    panels: list[Axes] = list(grid[:, 0])
    figure.suptitle(f"{history.name}: {title}", fontweight="bold")
    first, last = int(history.step[0]), int(history.step[-1])
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(first - 0.5, last + 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure, panels


def raw_and_smooth(axes: Axes, step: np.ndarray, values: np.ndarray, raw: str, mean: str) -> None:
    """Every value thin, above it their running mean. Of many steps the lowest and highest of each stretch stay."""
    bins = Bins(step, MOST_POINTS)
    low, high = bins.range(values)
    x, y = (step, values) if len(step) <= MOST_POINTS else (np.repeat(bins.center, 2), np.stack([low, high], 1).ravel())
    count = np.isfinite(values).sum()
    if not count:
        axes.text(0.5, 0.5, "no finite value was logged", transform=axes.transAxes, ha="center")
    axes.plot(x, y, color=RAW, linewidth=0.7, marker="o" if count == 1 else "", markersize=4, label=raw)
    axes.plot(bins.center, bins.mean(smooth(values)), color="black", linewidth=1.8, label=mean)


def a_line_each(axes: Axes, bins: Bins, names: list[str], columns: list[np.ndarray], kind: str = "layer") -> None:
    """One line a name; of many their range and median. `kind`: what is named."""
    lines = [bins.mean(column) for column in columns]
    marker = "o" if len(bins.center) == 1 else ""
    if len(names) <= len(LINES):
        for name, line, (colour, style) in zip(names, lines, LINES, strict=False):
            look = {"linestyle": style, "color": colour, "marker": marker, "linewidth": 1.4}
            axes.plot(bins.center, line, label=name, **look)
    else:
        stack = np.stack(lines)
        low, high = np.fmin.reduce(stack), np.fmax.reduce(stack)
        axes.fill_between(bins.center, low, high, color="#d0d0d0", label=f"lowest to highest of {len(names)} {kind}s")
        middle = np.array([np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan for c in stack.T])
        axes.plot(bins.center, middle, color="black", marker=marker, linewidth=1.4, label=f"median {kind}")


def plain_log_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Above the panel, where it covers no data."""
    found = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(handles=found, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False, borderaxespad=0.2)
