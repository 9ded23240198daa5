"""The figures of a run, as matplotlib Figure objects: they read in black and white, every axis names its unit.

A chart is None where the run has nothing of its kind (no mixture of experts, no evaluation, lines of an older run).
"""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lamella.train.history import Bins, History, label, smooth
from lamella.train.plot import (
    BLUE,
    FILLS,
    MOST_POINTS,
    a_line_each,
    legend,
    over_steps,
    plain_log_ticks,
    raw_and_smooth,
)

MOST_COLUMNS, MOST_STACKED = 300, 120


def loss(history: History) -> Figure:
    """Training and held-out loss; a second scale gives bits per byte, by the held-out text's bytes per token."""
    figure, (axes,) = over_steps(history, "loss", [4.6])
    values = history.column("loss")
    raw_and_smooth(axes, history.step, values, "training, each step", "training, smoothed")
    held, bits = history.column("heldout_loss"), history.column("heldout_bits_per_byte")
    known = np.isfinite(held)
    if known.any():
        points = {"marker": "o", "markersize": 6, "clip_on": False, "zorder": 3}
        axes.plot(history.step[known], held[known], "--", color=BLUE, linewidth=1.2, label="held-out", **points)
    axes.set_ylabel("loss (nats per token)")
    ratio = np.median((bits / held)[np.isfinite(bits / held)]) if np.isfinite(bits).any() else 0.0
    if ratio > 0:
        scales = (lambda y: np.multiply(y, ratio), lambda b: np.divide(b, ratio))
        second = axes.secondary_yaxis("right", functions=scales)
        second.set_ylabel("held-out text: bits per byte")
        last = np.flatnonzero(np.isfinite(bits))[-1]
        axes.annotate(
            f"{bits[last]:.3f} bits per byte",
            (float(history.step[last]), float(held[last])),
            xytext=(-4, 26),
            textcoords="offset points",
            ha="right",
            color=BLUE,
            arrowprops={"arrowstyle": "-", "color": BLUE, "linewidth": 0.8, "shrinkB": 4},
        )
    legend(axes)
    return figure


def optimization(history: History) -> Figure:
    """Learning rate above, gradient norm beneath, and where it was clipped."""
    figure, (above, below) = over_steps(history, "learning rate and gradient norm", [2.2, 3.0])
    bins = Bins(history.step, MOST_POINTS)
    marker = "o" if len(history.step) == 1 else ""
    above.plot(bins.center, bins.mean(history.column("lr")), color="black", marker=marker, label="learning rate")
    above.set_ylabel("learning rate")
    above.set_ylim(bottom=0)
    above.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    norm = history.column("grad_norm")
    norm = np.where(norm > 0, norm, np.nan)
    raw_and_smooth(below, history.step, norm, "each step", "smoothed")
    known = norm[np.isfinite(norm)]
    if history.clip_norm and known.size:
        share = np.mean(known > history.clip_norm)
        name = f"clipped above {history.clip_norm:g} ({share:.0%} of steps)"
        below.axhline(history.clip_norm, color=BLUE, linestyle="--", label=name)
    if known.size:
        below.set_yscale("log")
        plain_log_ticks(below)
    below.set_ylabel("gradient norm (log scale)")
    legend(below)
    return figure


def throughput(history: History) -> Figure:
    """Tokens a second with their median."""
    figure, (axes,) = over_steps(history, "throughput", [3.6])
    speed = history.column("tokens_per_second")
    raw_and_smooth(axes, history.step, speed, "each step", "smoothed")
    if np.isfinite(speed).any():
        median = float(np.nanmedian(speed))
        axes.axhline(median, color=BLUE, linestyle="--", label=f"median {median:,.0f}")
    axes.set_ylabel("training tokens per second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    legend(axes)
    return figure


def sources(history: History) -> Figure | None:
    """Loss by source of the data, and each one's share of the tokens beneath; nothing where there is one source."""
    names = history.sources()
    if not names:
        return None
    figure, (loss, share) = over_steps(history, "loss by source", [4.0, 1.6])
    bins = Bins(history.step, MOST_COLUMNS)
    a_line_each(loss, bins, names, [smooth(history.column("sources", name, "loss")) for name in names], "source")
    loss.set_ylabel("loss (nats per token), smoothed")
    tokens = np.nan_to_num(np.stack([history.column("sources", name, "tokens") for name in names]))
    parts = list(100 * tokens / np.maximum(tokens.sum(axis=0), 1))
    a_line_each(share, bins, names, parts, "source")
    share.set_ylabel("share of the\ntokens (%)")
    share.set_ylim(bottom=0)
    legend(loss)
    return figure


def experts(history: History) -> Figure | None:
    """Each expert's load relative to an even share, over the steps; dropped tokens and the router's entropy beneath."""
    layers = history.layers()
    if not layers:
        return None
    bins = Bins(history.step, MOST_COLUMNS)
    loads = [bins.mean(history.load(layer)) for layer in layers]
    sizes = [load.shape[1] for load in loads]
    tall = min(6.0, max(2.6, 0.16 * sum(sizes)))
    figure, (heat, drop, entropy) = over_steps(history, "load of the experts", [tall, 1.1, 1.9])
    image = bins.spread(np.concatenate(loads, axis=1)).T
    limit = _load_limit(image)
    picture = heat.imshow(
        np.ma.masked_invalid(np.clip(image, 1 / limit, limit)),
        extent=(bins.edges[0], bins.edges[-1], sum(sizes), 0),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        norm=LogNorm(1 / limit, limit),
    )
    _name_rows(heat, layers, sizes, tall)
    heat.grid(False)
    heat.tick_params(axis="y", length=0)
    _load_scale(figure, heat, picture, limit, tall)
    a_line_each(drop, bins, [label(x) for x in layers], [100 * history.column("moe", x, "dropped") for x in layers])
    drop.set_ylabel("dropped (%)")
    top = max(1.0, 1.1 * drop.get_ylim()[1])
    drop.set_ylim(-0.06 * top, top)  # a line of zeros stays apart from the frame
    drop.yaxis.set_major_locator(MaxNLocator(3))
    a_line_each(entropy, bins, [label(x) for x in layers], [history.column("moe", x, "entropy") for x in layers])
    for even in sorted({math.log(n) for n in sizes}):
        entropy.axhline(even, color="#555555", linewidth=0.8, label=f"even: ln {round(math.exp(even))} = {even:.2f}")
    entropy.set_ylabel("router entropy\n(nats per token)")
    legend(entropy)
    return figure


def seconds(history: History) -> Figure | None:
    """Where the time of a step goes, stacked, with the median of each part beside."""
    parts = history.parts()
    if not parts:
        return None
    figure, (axes,) = over_steps(history, "time of a step", [4.2])
    bins = Bins(history.step, MOST_STACKED)
    columns = np.stack([1000 * history.column("seconds", part) for part in parts])
    timed = np.isfinite(columns).any(axis=0)
    whole, share = np.nansum(columns[:, timed], axis=0), np.nansum(columns, axis=1) / np.nansum(columns)
    heights = np.nan_to_num(np.stack([bins.mean(column) for column in columns]))
    tops = np.cumsum(bins.spread(heights.T).T, axis=0)
    width = max(len(p) for p in parts)
    for i, part in enumerate(parts):
        colour, hatch = FILLS[i % len(FILLS)]
        middle = float(np.nanmedian(columns[i]))
        axes.stairs(
            tops[i],
            bins.edges,
            baseline=tops[i - 1] if i else 0,
            fill=True,
            facecolor=colour,
            edgecolor="black",
            linewidth=0.4,
            hatch=hatch,
            label=f"{part:<{width}}  {middle:8,.1f} ms  {share[i]:6.1%}",
        )
    axes.set_ylabel("milliseconds per step, first process")
    axes.set_ylim(bottom=0)
    axes.grid(False)
    table = axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        reverse=True,
        prop={"family": "monospace"},
        title=f"median of a step: {np.median(whole):,.1f} ms; of its parts, and their share of all time",
    )
    table.set_in_layout(True)
    return figure


CHARTS: dict[str, Callable[[History], Figure | None]] = {
    "loss": loss,
    "optimization": optimization,
    "throughput": throughput,
    "sources": sources,
    "experts": experts,
    "time": seconds,
}


def _load_limit(image: np.ndarray) -> float:
    """A power of two on both sides of even that holds nearly all: a few rare extremes must not drown the rest."""
    known = image[np.isfinite(image)]
    far = np.percentile(np.abs(np.log2(np.clip(known, 1 / 16, 16))), 97) if known.size else 1.0
    return 2.0 ** max(1, math.ceil(far - 0.1))


def _name_rows(heat: Axes, layers: list[str], sizes: list[int], tall: float) -> None:
    """Layers apart by white lines, named at the left as far as there is room in `tall` inches."""
    ends, room = np.cumsum(sizes), tall / len(layers)
    for end in ends[:-1]:
        heat.axhline(end, color="white", linewidth=min(3.0, 6 * room))
    every = math.ceil(0.17 / room)
    counts = [f"\n{size} experts" if room > 0.5 else "" for size in sizes]
    names = [label(layer) + count for layer, count in zip(layers, counts, strict=True)]
    heat.set_yticks((ends - np.array(sizes) / 2)[::every], names[::every])


def _load_scale(figure: Figure, heat: Axes, picture: AxesImage, limit: float, tall: float) -> None:
    powers = range(-int(math.log2(limit)), int(math.log2(limit)) + 1)
    names = {0: "even"} | {p: (f"{2**p}x" if p > 0 else f"1/{2**-p}") for p in powers if p}
    bar = figure.colorbar(picture, ax=heat, pad=0.01, aspect=tall / 0.13, extend="both", ticks=[2.0**p for p in powers])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticklabels([names[p] for p in powers])
    bar.set_label("tokens, relative to an even share")
