"""The figure of a run's layout: ranks and their groups, stages and their predicted costs, one step of the pipeline."""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lamella.train.layout_record import LayoutRecord, Slot, timeline
from lamella.train.plot import FILLS, RED, WIDTH, legend

ROOM = WIDTH - 1.9  # inches of a panel, beside its labels
WITH_NUMBERS, WITHOUT, MOST_ROWS = 26, 72, 24  # ranks side by side; rows of ranks
BAR, BAR_ALONE = 0.24, 0.19  # inches from a bar to the next text, or bar
WORDY_STAGES = 40  # with more of them no layers are named
MOST_SLOTS = 300  # of a pipeline rank, side by side; of a longer step only the beginning is drawn
MOST_WORK = 200_000  # slots of a whole step
ENDS = {"embedding": ("#ffffff", "...."), "head and loss": ("#ffffff", "xxxx")}
KINDS = (("#b9cfe6", ""), ("#5f86b3", "//"), ("#1f3a5f", ""), ("#d9a066", "\\\\"), ("#f2f2f2", "||"), ("#7a7a7a", "--"))
OTHER = ("#dddddd", "++")
SLOTS = {"F": FILLS[0][0], "B": FILLS[2][0], "I": FILLS[2][0], "W": FILLS[3][0]}
ZERO = ("optimizer state", "optimizer state and gradients", "optimizer state, gradients and parameters")


def short(layers: Sequence[str]) -> str:
    """`a, a, b, c, b, c` as `a x2, (b, c) x2`."""
    found, at = [], 0
    while at < len(layers):
        block, times = list(layers[at : at + 1]), 1
        for width in range(1, (len(layers) - at) // 2 + 1):
            word, n = layers[at : at + width], 1
            while layers[at + n * width : at + (n + 1) * width] == word:
                n += 1
            if n > 1 and n * width > times * len(block):
                block, times = list(word), n
        name = short(block) if len(block) > 1 else block[0]
        found.append(name if times == 1 else f"({name}) x{times}" if len(block) > 1 else f"{name} x{times}")
        at += times * len(block)
    return ", ".join(found)


class Grid:
    """Where each rank is drawn: a row a pipeline rank, replicas side by side, in bands where one would be too wide."""

    def __init__(self, record: LayoutRecord):
        self.record = record
        for limit in (WITH_NUMBERS, WITHOUT):
            abreast = min(record.data, max(1, limit // record.tensor))
            bands = math.ceil(record.data / abreast)
            if bands * record.pipeline <= 12:
                break
        self.abreast = math.ceil(record.data / bands)
        self.bands = min(bands, max(1, MOST_ROWS // record.pipeline))
        self.drawn = min(record.data, self.bands * self.abreast)  # replicas
        self.gap = 0.3 if record.tensor > 1 else 0.0
        self.columns = self.abreast * (record.tensor + self.gap) - self.gap
        self.rows = self.bands * (record.pipeline + 0.9) - 0.9
        self.width = min(0.5, ROOM / self.columns)  # of a cell, in inches
        self.height = min(0.34, max(0.2, self.width))

    def cell(self, rank: int) -> tuple[float, float] | None:
        """Its left and upper edge, in cells; None: its replica is not drawn."""
        p, d, t = self.record.place(rank)
        if d >= self.drawn:
            return None
        band, column = divmod(d, self.abreast)
        return column * (self.record.tensor + self.gap) + t, band * (self.record.pipeline + 0.9) + p


def chart(name: str, record: LayoutRecord) -> Figure:
    """The panels there are something to show for: ranks, stages, the pipeline's step."""
    grid = Grid(record)
    texts = _stage_texts(record)
    heights = [grid.rows * grid.height + 1.1, _stage_room(texts) + 0.9]
    slots = timeline(record) if record.pipeline > 1 and _work(record) <= MOST_WORK else None
    if slots is not None:
        heights.append(min(6.0, 0.3 * record.pipeline) + 0.9)
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained", facecolor="white")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(f"{name}: layout of {_count(record.world, 'rank')}", fontweight="bold")
    figure.get_layout_engine().set(hspace=0.04)  # type: ignore[union-attr]
    _draw_ranks(panels[0], record, grid)
    _draw_stages(panels[1], record, texts)
    if slots is not None:
        _draw_step(panels[2], record, slots)
    return figure


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("s" if n != 1 else "")


def _draw_ranks(axes: Axes, record: LayoutRecord, grid: Grid) -> None:
    cells = {rank: place for rank in range(record.world) if (place := grid.cell(rank)) is not None}
    digits = len(str(record.world - 1))
    size = min(8.0, 72 * grid.width / (0.75 * digits))
    numbered = size >= 5.5
    shades = ("#ffffff", "#dde6ef")  # of replicas in turn
    axes.add_collection(
        PolyCollection(
            [_box(x, y, 1, 0.72) for x, y in cells.values()],
            facecolors=[shades[record.place(rank)[1] % 2] for rank in cells],
            edgecolors="#555555",
            linewidths=min(0.6, 3 * grid.width),
        )
    )
    handles: list[Line2D | Patch] = []
    if record.tensor > 1:
        groups = [_box(x, y, record.tensor, 0.72) for rank, (x, y) in cells.items() if record.place(rank)[2] == 0]
        wide = min(2.0, 14 * grid.width)
        axes.add_collection(PolyCollection(groups, facecolors="none", edgecolors="black", linewidths=wide))
        frame = {"facecolor": "none", "edgecolor": "black", "linewidth": 2}
        handles.append(Patch(label=f"tensor group of {record.tensor}", **frame))
    if record.expert > 1:
        axes.add_collection(_brackets(cells, record.expert_groups()))
        look = {"color": RED, "linewidth": 1.6, "marker": "|", "markersize": 6}
        handles.append(Line2D([], [], label=f"expert group of {record.expert}", **look))
    if numbered:
        for rank, (x, y) in cells.items():
            _inside(axes, x + 0.5, y + 0.36, str(rank), fontsize=size)
    _name_cells(axes, record, grid, numbered)
    axes.set_xlim(-0.1, max(grid.columns, ROOM / grid.width) + 0.1)
    axes.set_ylim(grid.rows, -0.1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("\n".join(_notes(record, grid, numbered)), fontsize=8, loc="left")
    if handles:
        room = grid.rows * grid.height  # inches; above it the replicas' names
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1 + 0.2 / room), ncols=3, frameon=False)


def _notes(record: LayoutRecord, grid: Grid, numbered: bool) -> list[str]:
    notes = textwrap.wrap(record.words, 110)
    steps = {"tensor": 1, "data": record.tensor, "pipeline": record.tensor * record.data}
    names = [name for name in steps if getattr(record, name) > 1]
    if names:
        terms = " + ".join(f"{steps[name]} {name[0]}".removeprefix("1 ") for name in names)
        rest = "" if numbered else f"; of {record.world:,} ranks most are not numbered"
        notes.append(f"rank = {terms}   ({', '.join(f'{name[0]} of {name}' for name in names)}){rest}")
    if grid.drawn < record.data:
        notes.append(f"data {grid.drawn:,} to {record.data - 1:,} are like these and not drawn")
    if record.data > 1:
        zero = f"ZeRO {record.zero}: {ZERO[record.zero - 1]} split over them"
        notes.append(f"data ranks compute the same on other rows; {zero}")
    return notes


def _name_cells(axes: Axes, record: LayoutRecord, grid: Grid, numbered: bool) -> None:
    """Pipeline ranks at the left, replicas above their columns, as far as there is room; at the right what ranks."""
    step = math.ceil(0.5 / (grid.width * (record.tensor + grid.gap)))  # inches of `data 12`
    ticks = {}
    for band, p in itertools.product(range(grid.bands), range(record.pipeline)):
        d = band * grid.abreast
        last = min(d + grid.abreast, grid.drawn)
        cell, row = grid.cell(record.tensor * (d + record.data * p)), record.data * p
        assert cell is not None
        ticks[cell[1] + 0.36] = f"pipeline {p}"
        if not numbered and len(ticks) % math.ceil(0.15 / grid.height) == 0:
            said = f" {record.tensor * (row + d):,} to {record.tensor * (row + last) - 1:,}"
            axes.text(grid.columns, cell[1] + 0.36, said, va="center", fontsize=7.5)
        for i in range(d, last, step) if p == 0 else ():
            x = cell[0] + (i - d) * (record.tensor + grid.gap) + record.tensor / 2
            axes.text(x, cell[1] - 0.1, f"data {i}", ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks([])
    every = math.ceil(0.15 / grid.height)
    axes.set_yticks(list(ticks)[::every], list(ticks.values())[::every], fontsize=8)


def _inside(axes: Axes, x: float, y: float, text: str, **look) -> None:
    """A text that needs no room of its own, so that the layout of the page need not measure it."""
    axes.text(x, y, text, ha="center", va="center", **look).set_in_layout(False)


def _box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def _brackets(cells: dict[int, tuple[float, float]], groups: list[range]) -> LineCollection:
    """Beneath the cells of each group, a piece a row; open where it goes on."""
    lines = []
    for group in groups:
        for y, row in itertools.groupby((r for r in group if r in cells), key=lambda rank: cells[rank][1]):
            ranks = list(row)
            a, b, foot = cells[ranks[0]][0] + 0.12, cells[ranks[-1]][0] + 0.88, y + 0.86
            left, right = foot - 0.08 * (ranks[0] == group[0]), foot - 0.08 * (ranks[-1] == group[-1])
            lines.append([(a, left), (a, foot), (b, foot), (b, right)])
    return LineCollection(lines, colors=RED, linewidths=1.4)


def _stage_texts(record: LayoutRecord) -> list[list[str]]:
    """Of each stage: what it holds, in lines."""
    found = []
    for stage in record.stages:
        ends = (["embedding"] if stage.embedding else [], ["head and loss"] if stage.head else [])
        text = ", ".join([*ends[0], short(stage.layers), *ends[1]])
        found.append(textwrap.wrap(text, 108) if len(record.stages) <= WORDY_STAGES else [])
    return found


def _stage_room(texts: list[list[str]]) -> float:
    return sum(BAR + 0.15 * len(lines) if lines else BAR_ALONE for lines in texts)


def _draw_stages(axes: Axes, record: LayoutRecord, texts: list[list[str]]) -> None:
    """A bar a stage, cut into its layers, what they are written above it. y is in inches."""
    fills = _fills(record)
    pieces: dict[tuple[str, str], list[list[tuple[float, float]]]] = {}
    mean, most, y, middles = 1 / len(record.stages), 100 * max(s.cost for s in record.stages), 0.0, []
    for stage, lines in zip(record.stages, texts, strict=True):
        axes.text(0, y + 0.02, "\n".join(lines), va="top", fontsize=7.5)
        y += 0.15 * len(lines)
        middles.append(y + 0.085)
        parts = [("embedding", stage.embedding), *zip(stage.layers, stage.costs, strict=True)]
        at = 0.0
        for kind, cost in [*parts, ("head and loss", stage.head)]:
            if cost:
                pieces.setdefault(fills[kind], []).append(_box(at, y, 100 * cost, 0.17))
            at += 100 * cost
        if len(record.stages) > 1:
            axes.text(1.02 * most, y + 0.085, f" {at:.1f} %, {stage.cost / mean:.2f} x even", va="center", fontsize=7.5)
        y += BAR if lines else BAR_ALONE
    for (colour, hatch), boxes in pieces.items():
        axes.add_collection(PolyCollection(boxes, facecolors=colour, hatch=hatch, edgecolors="black", linewidths=0.5))
    if len(record.stages) > 1:
        axes.axvline(100 * mean, color="black", linestyle="--", linewidth=0.9, label=f"even: {100 * mean:.1f} %")
    names = [f"stage {i}, pipeline {s.rank}" if record.pipeline > 1 else "model" for i, s in enumerate(record.stages)]
    axes.set_yticks(middles, names, fontsize=8)
    axes.set_ylim(y, -0.02)
    axes.set_xlim(0, 1.02 * most)
    axes.set_xlabel("predicted share of the model's cost, forward and backward (%)" + _imbalance(record))
    _quiet(axes)
    named = {fill: kind if fill != OTHER else "other layers" for kind, fill in fills.items() if fill in pieces}
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.5, label=name)
        for (colour, hatch), name in named.items()
    ]
    legend(axes, [*handles, *axes.get_legend_handles_labels()[0]])


def _fills(record: LayoutRecord) -> dict[str, tuple[str, str]]:
    """Colour and hatch by kind of layer, the frequent ones' apart from each other."""
    kinds = [kind for kind, _ in Counter(x for stage in record.stages for x in stage.layers).most_common()]
    own = len(KINDS) if len(kinds) <= len(KINDS) else len(KINDS) - 1
    return {kind: KINDS[i] if i < own else OTHER for i, kind in enumerate(kinds)} | ENDS


def _imbalance(record: LayoutRecord) -> str:
    if record.pipeline == 1:
        return ""
    costs = [stage.cost for stage in record.stages]
    text = f"\nlargest stage {max(costs) * len(costs):.3f} x the mean"
    if len(costs) > record.pipeline:
        ranks = [math.fsum(costs[i] for i in record.stages_of(p)) for p in range(record.pipeline)]
        text += f", largest rank {max(ranks) * len(ranks):.3f} x the mean"
    return text


def _work(record: LayoutRecord) -> int:
    return len(record.stages) * record.micro_batches * (3 if record.schedule == "zbv" else 2)


def _kinds(found: list[list[tuple[Slot, float, float]]]) -> set[str]:
    return {slot.kind for row in found for slot, *_ in row}


def _draw_step(axes: Axes, record: LayoutRecord, found: list[list[tuple[Slot, float, float]]]) -> None:
    """A row a pipeline rank, time to the right."""
    end = max(start + length for row in found for _, start, length in row)
    shown = min(1.0, MOST_SLOTS / max(map(len, found)))
    # Slots of a kind are numbered where all of them have room.
    least = {kind: min(n for row in found for slot, _, n in row if slot.kind == kind) for kind in _kinds(found)}
    digits = len(str(record.micro_batches - 1))
    numbered = {kind for kind, n in least.items() if n / (shown * end) * ROOM > 0.06 * digits + 0.04}
    boxes: dict[tuple[str, bool], list[list[tuple[float, float]]]] = {}
    for p, row in enumerate(found):
        mine = record.stages_of(p)
        for slot, start, length in row:
            if start > shown * end:
                break
            a, b, later = 100 * start / end, 100 * length / end, mine.index(slot.stage) % 2 == 1
            boxes.setdefault((slot.kind, later), []).append(_box(a, p + 0.1, b, 0.8))
            if slot.kind in numbered:
                colour = "white" if slot.kind == "W" else "black"
                behind = {"facecolor": SLOTS[slot.kind], "edgecolor": "none", "pad": 0.6}
                _inside(axes, a + b / 2, p + 0.5, str(slot.number), fontsize=6.5, color=colour, bbox=behind)
        idle = 1 - math.fsum(length for *_, length in row) / end
        axes.text(100 * shown, p + 0.5, f" idle {idle:.0%}", va="center", fontsize=7.5)
    slots = max(map(len, found)) * shown
    for (kind, later), places in boxes.items():
        look = {"facecolors": SLOTS[kind], "edgecolors": "black", "linewidths": min(0.5, 40 / slots)}
        axes.add_collection(PolyCollection(places, hatch="////" if later else "", **look))
    idle = 1 - math.fsum(length for row in found for *_, length in row) / (end * record.pipeline)
    part = "" if shown == 1 else f", the first {shown:.0%} of it drawn"
    axes.set_xlabel(
        f"predicted time of a step{part} (%): {record.micro_batches} micro-batches, schedule {record.schedule}\n"
        f"ranks idle {idle:.1%} of it; communication is left out"
    )
    axes.set_xlim(0, 100 * shown)
    axes.set_ylim(record.pipeline, 0)
    every = math.ceil(record.pipeline / 40)
    names = [f"pipeline {p}" for p in range(record.pipeline)]
    axes.set_yticks([p + 0.5 for p in range(record.pipeline)][::every], names[::every], fontsize=8)
    _quiet(axes)
    words = {"F": "forward", "B": "backward", "I": "backward: inputs", "W": "backward: weights"}
    handles = [Patch(facecolor=SLOTS[k], edgecolor="black", label=w) for k, w in words.items() if (k, False) in boxes]
    if any(later for _, later in boxes):
        again = "a rank's 2nd stage" if len(record.stages) == 2 * record.pipeline else "a rank's 2nd, 4th, ... stage"
        handles.append(Patch(facecolor="white", hatch="////", edgecolor="black", label=again))
    legend(axes, handles)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
