"""What ``fedveil report`` reads: the result files of runs and audits, checked before any is shown.

Only files named here are opened. Keys, checkpoints, models and archives stand beside them and stay
shut.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from fedveil.errors import FedveilError
from fedveil.results import renamed

_LARGEST_TEXT = 64 * 2**20
_MOST_ARTIFACTS = 64
_MOST_ROWS = 20_000

Share = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Text = Annotated[str, Field(max_length=2_000)]


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RoundLine(_Content):
    """One line of ``rounds.jsonl``: shares of images, σ in the strategy's unit, seconds."""

    round: int = Field(ge=1, le=10**9)
    accuracy: Share
    copies: tuple[Share, ...] = Field(min_length=1, max_length=100_000)
    sigma: FiniteFloat = Field(ge=0)
    seconds: FiniteFloat = Field(ge=0)
    bounded: tuple[Text, ...] = Field(default=(), max_length=100_000)


class Configuration(BaseModel):
    """Settings of a training run; those the report reasons with are checked, all are shown."""

    model_config = ConfigDict(frozen=True, extra="allow")

    dataset: Text
    model: Text
    strategy: Text
    cap: Share | None = None
    rounds: int = Field(ge=1, le=10**9)
    seed: int = Field(ge=0, le=2**63)
    report_images: Count


class Privacy(_Content):
    """What DP-SGD promised in a run; ε is None where it could not be told, with the reason."""

    epsilon: float | None = Field(default=None, ge=0)
    delta: Share
    adjacency: Text = "one image of a client"
    unit: Text = ""
    reason: Text = ""


class Returned(_Content):
    """What clients return that is no update of a model, as the server saw it."""

    server_sees: Text = ""


class ServerAlone(_Content):
    """What the server's own labelled images alone give, and what clients add to it."""

    images: Count
    accuracy: Share
    gain: Gain
    gain_low: Gain
    gain_high: Gain


class RunSummary(_Content):
    """``summary.json`` of a training run."""

    accuracy: Share
    report_images: Count
    report_doubles: Count = 0
    untested: tuple[Text, ...] = Field(default=(), max_length=100_000)
    calibration_images: Count = 0
    chance: Share | None = None
    round: int | None = Field(default=None, ge=1, le=10**9)
    last_accuracy: Share | None = None
    configuration: Configuration
    sends: Literal["model", "capped", "untrained"] | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)
    privacy: Privacy | None = None
    server_alone: ServerAlone | None = None
    analytic: Returned | None = None
    answers: Returned | None = None


class Audit(_Content):
    """What all audits share; ``name`` is the directory, as the user gave it."""

    kind: ClassVar[str]
    settings: dict[Text, Any] = Field(default_factory=dict)
    untold: tuple[Text, ...] = Field(default=(), max_length=100)
    name: Text = ""


class _Row(_Content):
    """What rows of attacks on a defence share, under the keys of this version or an earlier one."""

    attack: Text
    defense: Text
    adaptive: bool
    images: Count | None = None
    picked_out: Share | None = None
    picked_out_low: Share | None = None
    picked_out_high: Share | None = None
    picked_out_floor: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, content: Any) -> Any:
        return renamed(content) if isinstance(content, dict) else content


class _Rebuilt(_Row):
    """What rows of attacks that rebuild images share."""

    identified: Share
    identified_low: Share | None = None
    identified_high: Share | None = None
    identified_floor: Share | None = None
    psnr_original: float
    psnr_original_floor: float | None = None
    untold: Count = 0


class LeakageRow(_Rebuilt):
    """A row of ``leakage.json``: one attack on one defence; shares, decibels, seconds."""

    images: Count
    exact: Share
    exact_low: Share | None = None
    exact_high: Share | None = None
    label_accuracy: Share | None = None
    psnr_trained: float | None = None
    psnr_ceiling: float | None = None
    ssim_original: float | None = None
    seconds_per_image: float | None = None


class _Found(_Content):
    """Shares of used images found at 1 and 0.1 % of strangers; None where too few could tell."""

    tpr_at_1: Share | None = None
    tpr_at_1_low: Share | None = None
    tpr_at_1_high: Share | None = None
    tpr_at_01: Share | None = None
    tpr_at_01_low: Share | None = None
    tpr_at_01_high: Share | None = None


class Points(_Found):
    """How well scores part images that were used from others."""

    strangers: Count
    auc: Share
    auc_low: Share | None = None
    auc_high: Share | None = None


class MembershipRow(_Row):
    """A row of ``membership`` in ``leakage.json``: one attack that rebuilds nothing."""

    updates: Count | None = None
    picked_out: Share
    strangers: Points
    unseen: Points | None = None
    certain: Share | None = None


class TheftRow(_Content):
    """A row of ``theft.json``: one attack with so many labels and colluders, against none."""

    attack: Text
    labels: Count
    labels_held: tuple[Count, ...] = Field(default=(), max_length=100_000)
    colluders: Count
    accuracy: Share
    accuracy_low: Share | None = None
    accuracy_high: Share | None = None
    alone: Share
    alone_low: Share | None = None
    alone_high: Share | None = None
    advantage: Gain
    advantage_low: Gain | None = None
    advantage_high: Gain | None = None


class FrontierRow(_Rebuilt):
    """A row of ``frontier.json``: one defence at one strength under one attack."""

    strength: float | Text | None = None
    scenario: Text | None = None
    accuracy: Share
    accuracy_low: Share | None = None
    accuracy_high: Share | None = None

    @property
    def family(self) -> str:
        """The defence without its strength."""
        return self.defense.partition(":")[0]

    @property
    def strength_text(self) -> str:
        """The strength as text; empty where there is none."""
        if isinstance(self.strength, float):
            return f"{self.strength:g}"
        return self.strength or ""


class EgressRow(_Found):
    """A row of ``egress.json``: one attack."""

    attack: Text
    auc: Share
    auc_low: Share
    auc_high: Share


class Exposed(_Content):
    """One of the training images that a delivered model is surest of."""

    image: Count
    label: Count
    others_above: Count


class EgressAudit(Audit):
    """``egress.json``: what a delivered model tells of who was in its training."""

    kind: ClassVar = "egress audit"
    subject: Text
    members: Count
    others: Count
    accuracy_members: Share
    accuracy_others: Share
    rows: tuple[EgressRow, ...] = Field(min_length=1, max_length=_MOST_ROWS)
    exposed: tuple[Exposed, ...] = Field(default=(), max_length=1_000)
    told: bool = True


class SumsRow(_Found):
    """A row of ``sums.json``: whose sums, and how well an attack tells who is in them."""

    holder: Text
    attack: Text
    seen: bool
    images: Count
    auc: Share
    auc_low: Share
    auc_high: Share


class RebuiltFromSums(_Content):
    """``rebuilt`` of ``sums.json``: mean correlations with the originals."""

    images: Count
    lone: int | None = Field(default=None, ge=0)
    from_one_client: float = Field(ge=-1.01, le=1.01)
    from_the_round: float = Field(ge=-1.01, le=1.01)
    floor: float = Field(ge=-1.01, le=1.01)


class TracingForecast(_Content):
    """``forecast`` of ``sums.json``: what as many public images as are in the sums would tell."""

    public: Count
    auc: Share
    tpr_at_1: Share


class AllowedByNoise(_Content):
    """``allowed`` of ``sums.json``: what noise leaves possible to any attack."""

    auc: Share
    tpr_at_1: Share


class SumsAudit(Audit):
    """``sums.json``: what sums over clients' images tell of them."""

    kind: ClassVar = "audit of sums"
    subject: Text
    dimension: Count
    epsilon: float | None = Field(default=None, ge=0)
    public: Count
    strangers: Count
    forecast: TracingForecast | None = None
    allowed: AllowedByNoise | None = None
    rows: tuple[SumsRow, ...] = Field(min_length=1, max_length=_MOST_ROWS)
    rebuilt: RebuiltFromSums | None = None


class LeakageAudit(Audit):
    """``leakage.json``; ``arrays`` is the ``reconstructions.npz`` beside it, if there is one."""

    kind: ClassVar = "leakage audit"
    rows: tuple[LeakageRow, ...] = Field(min_length=1, max_length=_MOST_ROWS)
    membership: tuple[MembershipRow, ...] = Field(default=(), max_length=_MOST_ROWS)
    arrays: Path | None = None


class TheftAudit(Audit):
    """``theft.json``."""

    kind: ClassVar = "theft audit"
    reference: Share | None = None
    rows: tuple[TheftRow, ...] = Field(min_length=1, max_length=_MOST_ROWS)


class Frontier(Audit):
    """``frontier.json``: a grid of defences and strengths."""

    kind: ClassVar = "frontier"
    membership: tuple[dict[Text, Any], ...] = Field(default=(), max_length=_MOST_ROWS)
    rows: tuple[FrontierRow, ...] = Field(min_length=1, max_length=_MOST_ROWS)


@dataclass(frozen=True)
class Run:
    """A complete training run.

    Attributes:
        name: Its directory, as the user gave it.
        summary: Its outcome.
        rounds: Its rounds, 1 to the last.
    """

    name: str
    summary: RunSummary
    rounds: tuple[RoundLine, ...]

    @property
    def cap(self) -> float | None:
        """The accuracy cap; None where the strategy keeps none."""
        return self.summary.configuration.cap if self.sends == "capped" else None

    @property
    def sends(self) -> Literal["model", "capped", "untrained"]:
        """What clients received: the model, copies under a cap, or nothing that was learnt."""
        settings, told = self.summary.configuration, self.summary.sends
        if told is not None:
            # What has no number to keep is no cap.
            return "model" if told == "capped" and settings.cap is None else told
        # Of runs that did not say so, by the strategies there were then.
        shared = (settings.model_extra or {}).get("shared_rounds")
        if settings.strategy == "protected" and not shared:
            return "untrained"
        noisy = settings.strategy in ("noise-pair", "noise-delta") and settings.cap is not None
        return "capped" if noisy else "model"

    @property
    def returned(self) -> str | None:
        """What clients returned where it was no update of a model; None where it was one."""
        if self.summary.analytic is not None:
            return "sums over their images"
        return None if self.summary.answers is None else "answers to the server's images"

    @property
    def best_copy(self) -> float:
        """Accuracy of the best copy of any round."""
        return max(max(line.copies) for line in self.rounds)

    @property
    def rounds_over_cap(self) -> int:
        """Rounds in which a copy passed the cap; 0 without a cap."""
        cap = self.cap
        return 0 if cap is None else sum(max(line.copies) > cap for line in self.rounds)


@dataclass(frozen=True)
class Artifacts:
    """All that a report is made of; at least one is not empty."""

    runs: tuple[Run, ...] = ()
    leakages: tuple[LeakageAudit, ...] = ()
    thefts: tuple[TheftAudit, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    egresses: tuple[EgressAudit, ...] = ()
    sums: tuple[SumsAudit, ...] = ()

    @property
    def audits(self) -> tuple[Audit, ...]:
        """Every audit, kind by kind."""
        return (*self.leakages, *self.thefts, *self.sums, *self.egresses, *self.frontiers)


def read_artifacts(directories: Sequence[Path]) -> Artifacts:
    """Read every run and audit in ``directories`` or in their immediate sub-directories.

    Args:
        directories: At least one; each must hold a run, a leakage or theft audit or a frontier.

    Raises:
        FedveilError: One holds none, a run has not ended, a file is damaged, or there are more than
            64 runs and audits.
    """
    places = list(dict.fromkeys(place for path in directories for place in _places(path)))
    if len(places) > _MOST_ARTIFACTS:
        raise FedveilError(
            f"{len(places)} runs and audits were given; a page shows at most {_MOST_ARTIFACTS}: "
            "name fewer directories"
        )
    return Artifacts(
        runs=tuple(_run(p) for p in places if _has_run(p)),
        leakages=tuple(map(_with_arrays, _audits(LeakageAudit, places, "leakage.json"))),
        thefts=tuple(_audits(TheftAudit, places, "theft.json")),
        frontiers=tuple(_audits(Frontier, places, "frontier.json")),
        egresses=tuple(_audits(EgressAudit, places, "egress.json")),
        sums=tuple(_audits(SumsAudit, places, "sums.json")),
    )


def _places(path: Path) -> Iterator[Path]:
    try:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise FedveilError(f"{path} {what}; name the --out directory of a run or an audit")
        found = [place for place in (path, *sorted(path.iterdir())) if _is_artifact(place)]
    except (OSError, ValueError) as error:
        raise FedveilError(f"{str(path)!r} cannot be read: {error}") from None
    if not found:
        raise FedveilError(
            f"{path} holds no run and no audit: neither it nor a folder in it has a rounds.jsonl, "
            "leakage.json, sums.json, theft.json, egress.json or frontier.json; name the --out "
            "directory of fedveil train, fedveil audit or fedveil frontier"
        )
    yield from found


def _is_artifact(path: Path) -> bool:
    return path.is_dir() and (_has_run(path) or any(_has(path, f"{kind}.json") for kind in _AUDITS))


_AUDITS = ("leakage", "sums", "theft", "egress", "frontier")


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file()


def _has_run(path: Path) -> bool:
    return _has(path, "rounds.jsonl") or _has(path, "config.json")


def _run(path: Path) -> Run:
    if not _has(path, "summary.json"):
        raise FedveilError(
            f"the run {path} has not ended: it has no summary.json; end it with "
            f"fedveil train --resume {path}, or leave it out"
        )
    summary = _checked(RunSummary, _object(path / "summary.json"), path / "summary.json")
    file = path / "rounds.jsonl"
    lines = _text(file).splitlines()
    if not lines:
        raise FedveilError(f"{file} is empty: the run it belongs to is damaged; leave it out")
    rounds = tuple(
        _checked(RoundLine, _parsed(line, f"{file}, line {number}"), f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
    )
    if [line.round for line in rounds] != list(range(1, len(rounds) + 1)):
        raise FedveilError(f"{file} does not hold rounds 1 to {len(rounds)} in order; leave it out")
    planned = summary.configuration.rounds
    if planned != len(rounds):
        raise FedveilError(
            f"{file} holds {len(rounds)} rounds and summary.json speaks of {planned}; the two "
            "are not of one run; leave it out, or train anew"
        )
    return Run(str(path), summary, rounds)


_Kind = TypeVar("_Kind", bound=Audit)


def _audits(kind: type[_Kind], places: Sequence[Path], name: str) -> Iterator[_Kind]:
    for path in places:
        if _has(path, name):
            audit = _checked(kind, _object(path / name), path / name)
            yield audit.model_copy(update={"name": str(path)})


def _with_arrays(audit: LeakageAudit) -> LeakageAudit:
    # Whatever the file says: only what is beside it is opened.
    arrays = Path(audit.name) / "reconstructions.npz"
    return audit.model_copy(update={"arrays": arrays if arrays.is_file() else None})


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_TEXT:
            raise FedveilError(
                f"{file} is larger than {_LARGEST_TEXT >> 20} MiB, so fedveil did not write it; "
                "leave it out"
            )
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedveilError(f"{file} cannot be read: {error}; leave it out") from None


def _object(file: Path) -> Any:
    return _parsed(_text(file), str(file))


def _parsed(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FedveilError(
            f"{origin} is damaged or half-written ({error}); make it anew, or leave it out"
        ) from None


_Model = TypeVar("_Model", bound=BaseModel)


def _checked(model: type[_Model], content: Any, origin: object) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        detail = error.errors(include_input=False)[0]
        place = ".".join(str(part)[:80] for part in detail["loc"]) or "its content"
        raise FedveilError(
            f"{origin} is not what fedveil writes: {place}: {detail['msg']}; make it anew, or "
            "leave it out"
        ) from None
