"""The page itself: charts, tables and limits made ready, and the template filled in."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedveil import __version__
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.report.artifacts import (
    Artifacts,
    Frontier,
    FrontierRow,
    LeakageAudit,
    MembershipRow,
    Run,
    TheftAudit,
    TheftRow,
    read_artifacts,
)
from fedveil.report.controls import controls
from fedveil.report.finding import percent, points
from fedveil.report.gallery import IMAGES, ROWS, Strip, gallery
from fedveil.report.svg import Axis, Chart, Series, counts, draw, legend, shares
from fedveil.report.verdict import ranked, without_floor
from fedveil.results import IDENTIFIED, SCORES, exact_of
from fedveil.wording import quantity

_LISTED_ROUNDS = 200
_LISTED_ROWS = 500
_MOST_CLAIMS = 5
_LONGEST_VALUE = 300
_SECRET_NAME = re.compile(r"key|secret|token|passw|credential", re.IGNORECASE)
# XML and HTML know no other control characters, and no half of a surrogate pair.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class DrawnChart:
    """A chart ready for the template.

    Attributes:
        svg, legend: Elements.
        caption: What it shows.
    """

    svg: Markup
    legend: Markup
    caption: str


@dataclass(frozen=True)
class Settings:
    """The settings or versions of one run or audit, as pairs of name and value."""

    name: str
    kind: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunView:
    """A run with its chart; ``listed`` are evenly spaced rounds, the last among them."""

    run: Run
    picture: DrawnChart
    listed: tuple[Any, ...]


@dataclass(frozen=True)
class LeakageView:
    """A leakage audit with its chart and pictures."""

    audit: LeakageAudit
    picture: DrawnChart
    strips: tuple[Strip, ...]

    @property
    def membership(self) -> tuple[MembershipRow, ...]:
        """The rows of membership that are shown: who knows that nothing was done knows no more."""
        bare = [row for row in self.audit.membership if row.defense == "none"]
        naive = {row.attack for row in bare if not row.adaptive}
        twice = [row for row in bare if row.adaptive and row.attack in naive]
        return tuple(row for row in self.audit.membership if row not in twice)[:_LISTED_ROWS]


@dataclass(frozen=True)
class TheftView:
    """A theft audit with its chart and the best theft for each number of labels and colluders."""

    audit: TheftAudit
    picture: DrawnChart
    best: tuple[TheftRow, ...]
    rows: tuple[TheftRow, ...]


@dataclass(frozen=True)
class FrontierView:
    """A frontier with its chart and the worst attack at each of its points."""

    frontier: Frontier
    picture: DrawnChart
    worst: tuple[FrontierRow, ...]


def write_report(directories: Sequence[Path], out: Path, *, title: str = "fedveil report") -> None:
    """Write one self-contained HTML page about runs and audits.

    Args:
        directories: Directories of runs and audits, or of folders that hold them.
        out: HTML file; replaced whole.
        title: Heading of the page.

    Raises:
        FedveilError: As ``read_artifacts``; a damaged ``reconstructions.npz``; or the file cannot
            be written.
    """
    page = build_page(read_artifacts(directories), title=title, now=datetime.now(UTC))
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise FedveilError(
            f"--out {out} could not be written: {error.strerror}; make room, mend the permissions "
            "or name another file"
        ) from error


def build_page(artifacts: Artifacts, *, title: str, now: datetime) -> str:
    """Return the page as HTML; everything from a file is escaped.

    Args:
        artifacts: What it is about.
        title: Its heading.
        now: When it was made.

    Raises:
        FedveilError: A ``reconstructions.npz`` is damaged.
    """
    leakages = [_leakage_view(n, audit) for n, audit in enumerate(artifacts.leakages)]
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _template().render(
        title=title,
        made=now.strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_digest=digest,
        scores={score.key: score for score in SCORES},
        findings=ranked(artifacts),
        controls=controls(artifacts),
        runs=[_run_view(n, run) for n, run in enumerate(artifacts.runs)],
        leakages=leakages,
        thefts=[_theft_view(n, audit) for n, audit in enumerate(artifacts.thefts)],
        frontiers=[_frontier_view(n, f) for n, f in enumerate(artifacts.frontiers)],
        egresses=artifacts.egresses,
        sums=artifacts.sums,
        settings=list(_settings(artifacts)),
        limits=list(_limits(artifacts, leakages)),
    )
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "number": _number,
        "quantity": quantity,
        "exact_of": lambda row: exact_of(row.model_dump()),
    }
    return environment.from_string(_resource("report.html.j2"))


@cache
def _resource(name: str) -> str:
    return (files("fedveil.report") / name).read_text(encoding="utf-8")


def _number(value: float | None, digits: int = 1) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e12 else "∞" if value > 0 else "−∞"


def _picture(chart: Chart, name: str) -> DrawnChart:
    return DrawnChart(draw(chart, name), legend(chart), chart.title)


def _run_view(number: int, run: Run) -> RunView:
    copies = [line.copies for line in run.rounds]
    series = [
        Series("the owner's model", tuple((float(r.round), r.accuracy) for r in run.rounds)),
        Series(
            "best copy sent to a client",
            tuple((float(r.round), max(r.copies)) for r in run.rounds),
            tuple(min(c) for c in copies),
            tuple(max(c) for c in copies),
        ),
    ]
    if run.cap is None:
        series[1] = Series(series[1].label, series[1].points)
    chart = Chart(
        title=f"Accuracy over the rounds: {run.name}",
        description=(
            f"After {quantity(run.summary.round or len(run.rounds), 'round')} the owner's model "
            f"has {percent(run.summary.accuracy)} accuracy; the best copy of any round had "
            f"{percent(run.best_copy)}."
        ),
        x=counts("round", len(run.rounds)),
        y=shares("accuracy"),
        series=tuple(series),
        level=None if run.cap is None else (run.cap, f"cap {percent(run.cap)}"),
    )
    step = -(-len(run.rounds) // _LISTED_ROUNDS)
    return RunView(run, _picture(chart, f"run-{number}"), run.rounds[::-1][::step][::-1])


def _leakage_view(number: int, audit: LeakageAudit) -> LeakageView:
    rows = audit.rows[:24]
    places = {row: index + 1.0 for index, row in enumerate(rows)}
    floor = max((row.identified_floor for row in rows if row.identified_floor), default=None)
    series = []
    for label, adaptive in (("does not know the defence", False), ("knows the defence", True)):
        group = [row for row in rows if row.adaptive == adaptive]
        if group:
            series.append(
                Series(
                    f"attacker {label}",
                    tuple((places[row], row.identified) for row in group),
                    tuple(_or(row.identified_low, row.identified) for row in group),
                    tuple(_or(row.identified_high, row.identified) for row in group),
                    joined=False,
                    notes=tuple(
                        f"{row.attack} on {row.defense}: {percent(row.identified)}" for row in group
                    ),
                )
            )
    chart = Chart(
        title=f"Images {IDENTIFIED.heading}: {audit.name}",
        description="; ".join(
            f"{index:.0f}: {row.attack} on {row.defense}, {percent(row.identified)}"
            for row, index in places.items()
        ),
        x=Axis(
            "row of the table below",
            0.5,
            len(rows) + 0.5,
            tuple((index, f"{index:.0f}") for index in places.values()),
        ),
        y=shares("share of images"),
        series=tuple(series),
        level=None if floor is None else (floor, f"floor {percent(floor)}"),
    )
    return LeakageView(audit, _picture(chart, f"leakage-{number}"), gallery(audit))


def _theft_view(number: int, audit: TheftAudit) -> TheftView:
    ordered = sorted(audit.rows, key=lambda row: (row.colluders, row.labels, -row.accuracy))
    best = tuple(
        next(rows) for _, rows in groupby(ordered, key=lambda row: (row.colluders, row.labels))
    )
    labels = sorted({row.labels for row in best})
    place = {count: float(index) for index, count in enumerate(labels)}
    series = []
    for colluders, group in groupby(best, key=lambda row: row.colluders):
        rows = list(group)
        who = "one client" if colluders <= 1 else f"{colluders} colluding clients"
        series.append(
            Series(
                f"best theft tried, {who}",
                tuple((place[row.labels], row.accuracy) for row in rows),
                tuple(_or(row.accuracy_low, row.accuracy) for row in rows),
                tuple(_or(row.accuracy_high, row.accuracy) for row in rows),
                notes=tuple(f"{row.attack}: {percent(row.accuracy)}" for row in rows),
            )
        )
    alone = {row.labels: row.alone for row in best}
    series.append(Series("training alone", tuple((place[count], alone[count]) for count in labels)))
    top = max(best, key=lambda row: row.advantage)
    chart = Chart(
        title=f"What a thief reaches: {audit.name}",
        description=(
            f"The largest gain is {points(top.advantage)}, by {top.attack} with {top.labels} "
            f"labels: {percent(top.accuracy)} against {percent(top.alone)} alone."
        ),
        x=Axis(
            "labelled images the thief has",
            -0.3,
            len(labels) - 0.7,
            tuple((place[count], f"{count:,}") for count in labels),
        ),
        y=shares("accuracy"),
        series=tuple(series),
    )
    return TheftView(audit, _picture(chart, f"theft-{number}"), best, audit.rows[:_LISTED_ROWS])


def _frontier_view(number: int, frontier: Frontier) -> FrontierView:
    def point(row: FrontierRow) -> tuple[str, str, float, str]:
        number = row.strength if isinstance(row.strength, float) else 0.0
        return row.scenario or "", row.defense, number, row.strength_text

    ordered = sorted(frontier.rows, key=lambda row: (point(row), -row.identified))
    worst = tuple(_worst(list(rows)) for _, rows in groupby(ordered, key=point))
    series = [
        Series(
            f"{family}, {scenario}" if scenario else family,
            tuple((row.identified, row.accuracy) for row in rows),
            joined=False,
            notes=tuple(
                f"{row.defense} {row.strength_text}: accuracy "
                f"{percent(row.accuracy)}, {percent(row.identified)} {IDENTIFIED.heading} by "
                f"{row.attack}"
                for row in rows
            ),
        )
        for (scenario, family), rows in (
            (key, list(group))
            for key, group in groupby(worst, key=lambda row: (row.scenario or "", row.family))
        )
    ]
    chart = Chart(
        title=f"Accuracy against leakage: {frontier.name}",
        description=(
            f"{quantity(len(worst), 'setting')} of "
            f"{quantity(len({row.family for row in worst}), 'defence')}, each under "
            "the attack that did best; better settings are further up and further left."
        ),
        x=shares(f"share of images {IDENTIFIED.heading}"),
        y=shares("accuracy"),
        series=tuple(series),
    )
    return FrontierView(frontier, _picture(chart, f"frontier-{number}"), worst[:_LISTED_ROWS])


def _worst(rows: Sequence[FrontierRow]) -> FrontierRow:
    """Return the first row, with what the best of all rows picked out."""
    picked = [row.picked_out for row in rows if row.picked_out is not None]
    return rows[0].model_copy(update={"picked_out": max(picked, default=None)})


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _settings(artifacts: Artifacts) -> Iterator[Settings]:
    for run in artifacts.runs:
        yield Settings(run.name, "training run", _pairs(run.summary.configuration.model_dump()))
        yield Settings(run.name, "versions", _pairs(run.summary.versions))
    for audit in artifacts.audits:
        yield Settings(audit.name, audit.kind, _pairs(audit.settings))


def _pairs(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _value(name, value)) for name, value in settings.items())[:_LISTED_ROWS]


def _value(name: str, value: Any) -> str:
    if _SECRET_NAME.search(name):
        return "withheld"
    if isinstance(value, list):
        text = ", ".join(str(part) for part in value[:100])
    elif isinstance(value, dict):
        text = ", ".join(f"{key}: {_value(str(key), part)}" for key, part in value.items())
    else:
        text = "–" if value is None else str(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " …"


def _limits(artifacts: Artifacts, leakages: Sequence[LeakageView]) -> Iterator[str]:
    yield (
        "Attacks named here are the strongest of those that were run. One that was not run, or "
        "that nobody has published yet, may do better."
    )
    yield from _limits_of_runs(artifacts.runs)
    yield from _limits_of_leakage(artifacts, leakages)
    for audit in artifacts.audits:
        yield from (f"{audit.name}: {sentence}" for sentence in audit.untold[:_MOST_CLAIMS])
    if artifacts.runs and not artifacts.egresses:
        yield "What the delivered model tells of who was in its training was not measured."
    if not artifacts.thefts:
        yield "Theft was not measured: no theft audit was given."
    if not artifacts.frontiers:
        yield "Accuracy against leakage over many defences was not measured: no frontier was given."
    where = sorted(
        {
            f"{settings.get('dataset', 'unknown data')} with {settings.get('model', 'a model')}"
            for settings in (
                *(run.summary.configuration.model_dump() for run in artifacts.runs),
                *(audit.settings for audit in artifacts.leakages),
                *(audit.settings for audit in artifacts.thefts),
            )
        }
    )
    if where:
        shown = "; ".join(text[:_LONGEST_VALUE] for text in where[:8])
        yield f"Measured on {shown}. Other data and other models may behave otherwise."


def _limits_of_runs(runs: Sequence[Run]) -> Iterator[str]:
    if not runs:
        yield "No training run was given: nothing is known of the copies clients receive."
        return
    fewest = min(run.summary.report_images for run in runs)
    margin = 100 * 1.96 * (0.25 / max(fewest, 1)) ** 0.5
    yield (
        f"Accuracies of runs come from {quantity(fewest, 'image')} or more, so each may be off by "
        f"up to {margin:.1f} points by the choice of images alone (95 %)."
    )
    if any(run.cap is not None for run in runs):
        yield (
            "The cap bounds what a copy does as it is. Whoever retrains a copy, or averages "
            "several, may get more out of it; only a theft audit measures that."
        )
    if unknown := [run.name for run in runs if run.summary.chance is None]:
        yield (
            f"How good guessing would be is not in the summary of {', '.join(unknown)[:600]}, so "
            "whether that model is of any use was not checked."
        )
    for run in runs:
        yield from _limits_of_run(run)
    if len({run.summary.configuration.seed for run in runs}) < 3:
        yield "Fewer than three seeds were run: another seed may end elsewhere."


def _limits_of_run(run: Run) -> Iterator[str]:
    if names := run.summary.untested:
        yield (
            f"No report image of {run.name} is of {', '.join(names)[:600]}, which it trains on: no "
            "accuracy tells how its model does there."
        )
    privacy = run.summary.privacy
    if privacy is not None and privacy.epsilon is None:
        yield f"{run.name} was promised an ε, and it is not known: {privacy.reason}."
    elif privacy is not None:
        yield (
            f"{run.name} promises ε = {privacy.epsilon:.3g} at δ = {privacy.delta:g}, for "
            f"{privacy.adjacency}."
        )
    bounded = {claim for line in run.rounds for claim in line.bounded}
    for claim in sorted(bounded)[:_MOST_CLAIMS]:
        yield f"In {run.name} a client claimed far more images than the others: {claim}."


def _limits_of_leakage(artifacts: Artifacts, leakages: Sequence[LeakageView]) -> Iterator[str]:
    if not leakages:
        yield "Leakage of clients' images was not measured: no leakage audit was given."
        return
    fewest = min(row.images for view in leakages for row in view.audit.rows)
    if fewest < 100:
        yield (
            f"A leakage audit attacked only {quantity(fewest, 'image')}; shares are as rough as "
            "their intervals say. Where all or none of them were hit, resampling shows no spread, "
            f"and the true share may be off by {percent(min(1.0, 3 / max(fewest, 1)))} (95 %)."
        )
    if bare := without_floor((*artifacts.leakages, *artifacts.frontiers)):
        yield (
            f"No floor stands beside the {IDENTIFIED.heading} shares of "
            f"{', '.join(bare)[:600]}: an earlier version wrote them, which matched a batch to its "
            "originals by the truth first, so that images without content reached 7 % in batches "
            "of 16 and 35 % in batches of 256. "
            "Of batches, such shares mean nothing below that; audit anew."
        )
    for audit in artifacts.leakages:
        if audit.settings.get("unchecked"):
            yield str(audit.settings["unchecked"])[:600]
    rows = [row for audit in artifacts.leakages for row in audit.rows]
    informed = {row.defense for row in rows if row.adaptive} | {"none"}
    if naive := sorted({row.defense for row in rows} - informed):
        yield (
            f"Attacked only by those who do not know the defence: {', '.join(naive)[:600]}. That "
            "such an attack fails does not show that the defence works."
        )
    if len(informed) > 1 and not artifacts.frontiers:
        yield "A leakage audit does not say what a defence costs in accuracy; a frontier does."
    if any(view.strips for view in leakages):
        yield (
            f"The gallery shows {IMAGES} images at most, those with the most detail, of the first "
            f"{ROWS} rows of an audit; the tables count all."
        )
    if any(view.audit.arrays is None for view in leakages):
        yield "An audit came without its reconstructions.npz, so its pictures are missing here."
