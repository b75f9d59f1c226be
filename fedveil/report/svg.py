"""Charts as SVG elements that take the page's colours, light or dark, and carry their own text.

Our own rather than matplotlib's, whose SVG has its colours fixed and its text drawn as shapes, so
that it can neither follow the reader's theme nor be read out. Series differ in colour, in dash and
in the shape of their markers: no reader depends on colour.
"""

from dataclasses import dataclass
from math import isfinite

from markupsafe import Markup, escape

STYLES = 6
"""Series that can be told apart in one chart; later ones begin again."""

_WIDTH, _HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 26.0, 14.0, 48.0
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 2", "1 3 6 3")
_LARGEST_MARKED = 20


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one group of its points.

    Attributes:
        label: Its name in the legend.
        points: (x, y), in order of x where they are joined by a line.
        low, high: Lower and upper end of each point's interval or band, or nothing.
        joined: Whether the points are joined.
        notes: What each point is, shown when pointed at.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    joined: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        label: Name and unit.
        low, high: Ends.
        ticks: Position and text of each tick.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: What it shows, read out first.
        description: What is to be seen, for those who do not see it.
        x, y: Axes.
        series: At most six are told apart.
        level: A horizontal line with its label, such as a cap.
    """

    title: str
    description: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: tuple[float, str] | None = None


SHARES = tuple((step / 5, f"{20 * step} %") for step in range(6))


def shares(label: str) -> Axis:
    """Return an axis from 0 to 100 %."""
    return Axis(label, 0.0, 1.0, SHARES)


def counts(label: str, high: int) -> Axis:
    """Return an axis from 1 to ``high`` with some five whole-numbered ticks."""
    step = next(s for s in _STEPS if high <= 6 * s)
    ticks = [1, *range(step, high + 1, step)] if step > 1 else list(range(1, high + 1))
    return Axis(label, 1.0, float(max(high, 2)), tuple((float(t), f"{t:,}") for t in ticks))


_STEPS = tuple(m * 10**e for e in range(12) for m in (1, 2, 5))


def draw(chart: Chart, name: str) -> Markup:
    """Return the chart as one ``<svg>`` element; ``name`` is unique in the page."""
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-labelledby="{}-t {}-d">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
        ).format(_WIDTH, _HEIGHT, name, name, name, chart.title, name, chart.description),
        _grid(chart),
    ]
    for index, series in enumerate(chart.series):
        parts.append(_series(chart, series, index % STYLES))
    if chart.level:
        parts.append(_level(chart, *chart.level))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend(chart: Chart) -> Markup:
    """Return the legend as a list, with a sample of line and marker for each series."""
    items = [
        Markup(
            '<li><svg class="sample s{}" viewBox="0 0 34 14" aria-hidden="true">{}{}</svg>{}</li>'
        ).format(
            index % STYLES,
            _stroke("M1 7H33", index % STYLES) if series.joined else "",
            _marker(17, 7, index % STYLES, ""),
            series.label,
        )
        for index, series in enumerate(chart.series)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _x(chart: Chart, value: float) -> float:
    share = (value - chart.x.low) / ((chart.x.high - chart.x.low) or 1)
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(chart: Chart, value: float) -> float:
    share = (value - chart.y.low) / ((chart.y.high - chart.y.low) or 1)
    share = min(max(share, 0.0), 1.0)
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _grid(chart: Chart) -> Markup:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    rows = [
        Markup(
            '<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
        ).format(_LEFT, y, right, _LEFT - 7, y + 4.5, text)
        for y, text in ((_y(chart, value), text) for value, text in chart.y.ticks)
    ]
    columns = [
        Markup(
            '<path class="grid" d="M{} {}v5"/><text x="{}" y="{}" text-anchor="middle">{}</text>'
        ).format(x, bottom, x, bottom + 19, text)
        for x, text in ((_x(chart, value), text) for value, text in chart.x.ticks)
    ]
    names = Markup(
        '<text x="{}" y="{}" text-anchor="middle">{}</text>'
        '<text transform="translate(16 {}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format((_LEFT + right) / 2, _HEIGHT - 8, chart.x.label, (_TOP + bottom) / 2, chart.y.label)
    return Markup("").join([*rows, *columns, names])


def _level(chart: Chart, value: float, label: str) -> Markup:
    y = _y(chart, value)
    return Markup(
        '<path class="level" d="M{} {}H{}"/>'
        '<text class="level" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(_LEFT, y, _WIDTH - _RIGHT, _WIDTH - _RIGHT - 4, y - 6, label)


def _series(chart: Chart, series: Series, style: int) -> Markup:
    places = [(_x(chart, x), _y(chart, y)) for x, y in series.points if isfinite(x) and isfinite(y)]
    if not places:
        return Markup("")
    parts = [_spread(chart, series)]
    if series.joined:
        parts.append(_stroke("M" + "L".join(f"{x} {y}" for x, y in places), style))
    if not series.joined or len(places) <= _LARGEST_MARKED:
        notes = series.notes or ("",) * len(places)
        parts += [_marker(x, y, style, note) for (x, y), note in zip(places, notes, strict=False)]
    return Markup('<g class="s{}">{}</g>').format(style, Markup("").join(parts))


def _spread(chart: Chart, series: Series) -> Markup:
    if not series.low:
        return Markup("")
    ends = [
        (_x(chart, x), _y(chart, low), _y(chart, high))
        for (x, _), low, high in zip(series.points, series.low, series.high, strict=True)
    ]
    if series.joined and len(ends) > _LARGEST_MARKED:
        there = "L".join(f"{x} {high}" for x, _, high in ends)
        back = "L".join(f"{x} {low}" for x, low, _ in reversed(ends))
        return Markup('<path class="band" d="M{}L{}Z"/>').format(there, back)
    lines = "".join(f"M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8" for x, low, high in ends)
    return Markup('<path class="whisker" d="{}"/>').format(lines)


def _stroke(path: str, style: int) -> Markup:
    return Markup('<path class="line" d="{}" stroke-dasharray="{}"/>').format(path, _DASHES[style])


def _marker(x: float, y: float, style: int, note: str) -> Markup:
    shapes = (
        f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        f"M{x - 4} {y - 4}h8v8h-8Z",
        f"M{x} {y - 5}l5 9h-10Z",
        f"M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z",
        f"M{x} {y + 5}l5 -9h-10Z",
        f"M{x - 5} {y - 1.5}h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5Z",
    )
    title = Markup("<title>{}</title>").format(note) if note else ""
    return Markup('<path class="marker" d="{}">{}</path>').format(escape(shapes[style]), title)
