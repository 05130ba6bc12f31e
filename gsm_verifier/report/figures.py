"""Figures of the report: matplotlib drawings as inline SVG that takes its colours from the page.

Every colour is a sentinel that is replaced by a CSS variable after drawing, and text stays text, so
that one drawing serves light mode, dark mode and print. One unit of a drawing is one CSS pixel.
"""

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

# The page defines a CSS variable of each name (`--verifier`), once for light and once for dark.
_INKS = ("ink", "muted", "grid", "verifier", "vote", "weighted", "majority", "train")
_SENTINEL = {name: f"#fe{index:02x}ef" for index, name in enumerate(_INKS)}

_UNITS_PER_INCH = 72  # matplotlib's SVG unit is the point
_FONT = 12.5
_LABEL_GAP = 16.0
_STYLE = {
    "font.size": _FONT,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar sign
    "axes.unicode_minus": True,
    "text.color": _SENTINEL["ink"],
    "axes.edgecolor": _SENTINEL["muted"],
    "axes.labelcolor": _SENTINEL["muted"],
    "xtick.color": _SENTINEL["muted"],
    "ytick.color": _SENTINEL["muted"],
    "grid.color": _SENTINEL["grid"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      label: its name, written at its right end or in the legend.
      ink: the CSS variable of its colour, without the dashes.
      x: positions, ascending.
      y: values.
      low: lower ends of the intervals; with `high`, drawn as a band. Empty: no band.
      high: upper ends of the intervals.
      dash: matplotlib's line style.
      width: stroke width in pixels.
      across: the value does not depend on x; drawn over the whole width.
    """

    label: str
    ink: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dash: Any = "-"
    width: float = 1.6
    across: bool = False


def curves(
    name: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int],
    x_label: str,
    y_label: str,
    alt: str,
    log: bool = True,
    floor: float | None = None,
    labels: str = "end",
) -> str:
    """Draws lines with their interval bands.

    Args:
      name: unique within the page; prefixes the drawing's ids.
      lines: what to draw; later lines lie on top.
      size: width and height in CSS pixels.
      x_label: written below the axis.
      y_label: written above the axis, unrotated.
      alt: the drawing in words, for those who cannot see it.
      log: whether x is logarithmic.
      floor: where y starts; None leaves it to the data.
      labels: "end" names each line at its right end, "below" in a legend under the drawing.

    Returns:
      An `<svg>` element.
    """
    legend_rows = math.ceil(len(lines) / 2) if labels == "below" else 0
    right = 22 + 7.2 * max(len(line.label) for line in lines) if labels == "end" else 12
    margins = (42, right, 50 + 20 * legend_rows, 30)  # left, right, bottom, top
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure, axes = _canvas((size[0], size[1] + 20 * legend_rows), margins)
        _x_axis(axes, [x for line in lines if not line.across for x in line.x], log)
        _y_axis(axes, [y for line in lines for y in (*line.y, *line.low, *line.high)], floor)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=_FONT, color=_SENTINEL["muted"], pad=10)
        for line in lines:
            _draw(axes, line)
        if labels == "end":
            _label_ends(axes, lines, size[1] - margins[2] - margins[3])
        else:
            handles, _ = axes.get_legend_handles_labels()
            figure.legend(
                handles=handles[::-1],  # the last drawn is the most important
                loc="lower left",
                ncols=2,
                fontsize=_FONT - 0.5,
                handlelength=2.4,
                borderpad=0,
            )
        return _inline(figure, name, alt)


def reliability(
    name: str, bins: Sequence[dict[str, Any]], *, size: tuple[int, int], alt: str
) -> str:
    """Draws a reliability diagram above the histogram of the values it is made of.

    Args:
      name: unique within the page; prefixes the drawing's ids.
      bins: rows of `low, high, mean_value, fraction_correct, count`; empty bins are skipped.
      size: width and height in CSS pixels.
      alt: the drawing in words.

    Returns:
      An `<svg>` element.
    """
    filled = [row for row in bins if row["count"]]
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure, top = _canvas(size, (42, 12, 150, 30))
        bottom = figure.add_axes(
            [42 / size[0], 50 / size[1], 1 - 54 / size[0], 64 / size[1]], sharex=top
        )
        ticks = [0, 0.25, 0.5, 0.75, 1]
        top.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
        top.xaxis.set_major_formatter("{x:g}")
        top.yaxis.set_major_formatter("{x:g}")
        top.grid(True, axis="both")
        top.tick_params(labelbottom=False, bottom=False)
        top.set_title(
            "share that is right", loc="left", fontsize=_FONT, color=_SENTINEL["muted"], pad=10
        )
        top.plot([0, 1], [0, 1], color=_SENTINEL["muted"], linestyle=(0, (4, 3)), linewidth=1)
        top.plot(
            [row["mean_value"] for row in filled],
            [row["fraction_correct"] for row in filled],
            color=_SENTINEL["verifier"],
            linewidth=1.8,
            marker="o",
            markersize=5,
        )
        bottom.bar(
            [row["low"] for row in filled],
            [row["count"] for row in filled],
            width=[0.94 * (row["high"] - row["low"]) for row in filled],
            align="edge",
            color=_SENTINEL["verifier"],
            alpha=0.45,
            linewidth=0,
        )
        bottom.set_yticks([])
        bottom.set_title(
            f"completions; fullest bin {max((row['count'] for row in filled), default=0):,}",
            loc="left",
            fontsize=_FONT,
            color=_SENTINEL["muted"],
            pad=6,
        )
        bottom.set_xlabel("the verifier's value")
        return _inline(figure, name, alt)


def sparkline(values: Sequence[float], *, points: int = 40) -> str:
    """A word-sized drawing of how values in 0..1 run; values outside are drawn at the border.

    Args:
      values: at least one finite number.
      points: at most this many are drawn.

    Returns:
      An `<svg>` element, hidden from screen readers: it repeats what the text beside it says.
    """
    width, height = 80, 18
    count = min(points, len(values))
    corners = []
    for index in range(count):
        at = index / max(count - 1, 1)
        value = min(max(values[round(at * (len(values) - 1))], 0.0), 1.0)
        corners.append(f"{at * width:.0f},{height - 1 - value * (height - 2):.1f}")
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<path d="M0,{height / 2:g}H{width}"/><polyline points="{" ".join(corners)}"/></svg>'
    )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Moves ascending positions as little as possible so that neighbours are `gap` apart.

    This is isotonic regression of `wanted[i] - i * gap`, pooling neighbours that are out of order.
    """
    pools: list[tuple[float, int]] = []  # mean, members
    for index, position in enumerate(wanted):
        mean, members = position - index * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean = (mean * members + other * others) / (members + others)
            members += others
        pools.append((mean, members))
    flat = [mean for mean, members in pools for _ in range(members)]
    return [base + index * gap for index, base in enumerate(flat)]


def _canvas(
    size: tuple[int, int], margins: tuple[float, float, float, float]
) -> tuple[Figure, Axes]:
    """A figure and axes laid out in pixels: no measuring of fonts that the reader may not have."""
    (width, height), (left, right, bottom, top) = size, margins
    figure = Figure(figsize=(width / _UNITS_PER_INCH, height / _UNITS_PER_INCH))
    axes = figure.add_axes(
        [left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height]
    )
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=1)
    return figure, axes


def _x_axis(axes: Axes, positions: Iterable[float], log: bool) -> None:
    positions = sorted(positions) or [1]
    first, last = positions[0], positions[-1]
    if not log:
        axes.set_xlim(first, last if last > first else first + 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
        return
    axes.set_xscale("log")
    axes.set_xlim(first / 1.08, last * 1.08)
    ticks = [
        digit * 10**power
        for power in range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
        for digit in (1, 2, 5)
        if first <= digit * 10**power <= last
    ]
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if math.log10(tick).is_integer()]
    axes.xaxis.set_major_locator(FixedLocator(ticks or [first]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _y_axis(axes: Axes, values: Iterable[float], floor: float | None) -> None:
    values = sorted(values)
    margin = 0.06 * (values[-1] - values[0]) or 0.06 * abs(values[0]) or 1.0
    axes.set_ylim(values[0] - margin if floor is None else floor, values[-1] + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _draw(axes: Axes, line: Line) -> None:
    ink = _SENTINEL[line.ink]
    if line.across:
        axes.axhline(
            line.y[-1], color=ink, linestyle=line.dash, linewidth=line.width, label=line.label
        )
        return
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=ink, alpha=0.13, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        color=ink,
        linestyle=line.dash,
        linewidth=line.width,
        label=line.label,
        marker="o" if len(line.x) <= 12 else None,
        markersize=3.2,
    )


def _label_ends(axes: Axes, lines: Sequence[Line], height: float) -> None:
    """Names each line at its right end, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    scale = height / (top - bottom)
    ranked = sorted(lines, key=lambda line: line.y[-1])
    places = spread([(line.y[-1] - bottom) * scale for line in ranked], _LABEL_GAP)
    for line, place in zip(ranked, places, strict=True):
        axes.annotate(
            line.label,
            xy=(1, line.y[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(16, place - (line.y[-1] - bottom) * scale),
            textcoords="offset points",
            va="center",
            color=_SENTINEL[line.ink],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": _SENTINEL[line.ink],
                "linewidth": 0.8,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def _inline(figure: Figure, name: str, alt: str) -> str:
    """The figure as an element of an HTML page: no prologue, no fixed size, no ids but its own."""
    buffer = io.StringIO()
    silent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=silent)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style element is dropped because its `*` selector would reach the whole page.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    label = html.escape(alt)
    svg = re.sub(r"<svg.*?>", f'<svg {view_box} role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # the page's own
    for ink, sentinel in _SENTINEL.items():
        svg = svg.replace(sentinel, f"var(--{ink})")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
