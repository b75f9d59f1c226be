"""What Flower's FedAvg takes, as fedveil's strategies take it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from flwr.app import MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

from fedveil.errors import FedveilError
from fedveil.federation.replies import WEIGHT_KEY, Update
from fedveil.federation.roster import Sampling

_Told = int | float | list[int] | list[float]
Aggregate = Callable[[list[RecordDict], str], MetricRecord]

ARRAYS, CONFIG = "arrays", "config"
_ROUND = "server-round"
_TAKEN = (RECORD_KEY_CONFIGS, "unlabelled", "questions")
NO_CLIENT_EVALUATION = (
    "clients evaluate nothing: evaluation on a client would send it the model itself, as it is; "
    "evaluate on the server, by start(evaluate_fn=…)"
)


class FedAvgArguments(TypedDict, total=False):
    """Arguments of ``flwr.serverapp.strategy.FedAvg``, by its names; each may be left out.

    ``fraction_evaluate``, ``min_evaluate_nodes`` and ``evaluate_metrics_aggr_fn`` are taken and
    without effect, which the log says once: evaluation on clients would send them the model.
    ``fraction_train``, ``min_train_nodes`` and ``min_available_nodes`` are the same as
    ``sampling``'s own, so give either.
    """

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: Aggregate | None
    evaluate_metrics_aggr_fn: Aggregate | None


@dataclass(frozen=True)
class Asked:
    """FedAvg's arguments, checked.

    Attributes:
        sampling: How each round chooses its clients.
        weight: Metric by which answers and metrics are weighed.
        arrays, config: Names of the records a client is sent.
        aggregate: The app's own aggregation of its metrics; None for the weighted mean.
        evaluation: Whether evaluation on clients was asked for in so many words.
    """

    sampling: Sampling
    weight: str
    arrays: str
    config: str
    aggregate: Aggregate | None
    evaluation: bool


def read_arguments(given: FedAvgArguments, sampling: Sampling | None) -> Asked:
    """Check FedAvg's arguments.

    Args:
        given: What the caller named.
        sampling: fedveil's own argument for some of them.

    Raises:
        TypeError: One is none of FedAvg's.
        FedveilError: A value out of range, one given twice, or two records of one name.
    """
    if unknown := given.keys() - FedAvgArguments.__annotations__.keys():
        raise TypeError(f"unexpected argument {sorted(unknown)[0]!r}: neither FedAvg's nor ours")
    names = {
        "weighted_by_key": given.get("weighted_by_key", WEIGHT_KEY),
        "arrayrecord_key": given.get("arrayrecord_key", ARRAYS),
        "configrecord_key": given.get("configrecord_key", CONFIG),
    }
    for argument, name in names.items():
        if not isinstance(name, str) or not name:
            raise FedveilError(f"{argument}={name!r} is no name: give a string such as 'arrays'")
    weight, arrays, config = names.values()
    if arrays == config or arrays in _TAKEN or config in _TAKEN:
        raise FedveilError(
            f"arrayrecord_key={arrays!r} and configrecord_key={config!r} must differ, from each "
            f"other and from {' and '.join(_TAKEN)}, which fedveil sends beside them"
        )
    for argument in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
        function = given.get(argument)
        if function is not None and not callable(function):
            raise FedveilError(
                f"{argument}={function!r} is no function of (list[RecordDict], str): give one that "
                "returns a MetricRecord, or leave it out"
            )
    return Asked(
        sampling=_sampling(given, sampling),
        weight=weight,
        arrays=arrays,
        config=config,
        aggregate=given.get("train_metrics_aggr_fn"),
        evaluation=_evaluation(given),
    )


def _sampling(given: FedAvgArguments, sampling: Sampling | None) -> Sampling:
    named = given.keys() & {"fraction_train", "min_train_nodes", "min_available_nodes"}
    if named and sampling is not None:
        raise FedveilError(
            f"{sorted(named)[0]} and sampling= both say how clients are chosen: give either"
        )
    fraction = given.get("fraction_train", 1.0)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise FedveilError(
            f"fraction_train={fraction!r} is out of range: give more than 0, which would train "
            "nobody, and at most 1, which trains all"
        )
    counts = {
        name: given.get(name, default)
        for name, default in (("min_train_nodes", 1), ("min_available_nodes", 2))
    }
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise FedveilError(f"{name}={count!r} is out of range: give a whole number from 1")
    least, available = cast("tuple[int, int]", tuple(counts.values()))
    if not named:
        return sampling or Sampling()
    return replace(
        Sampling(), fraction=float(fraction), min_clients=max(least, available), min_train=least
    )


def _evaluation(given: FedAvgArguments) -> bool:
    fraction = given.get("fraction_evaluate", 0.0)
    least = given.get("min_evaluate_nodes", 0)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise FedveilError(f"fraction_evaluate={fraction!r} is no number: leave it out, or give 0")
    if type(least) is not int:
        raise FedveilError(f"min_evaluate_nodes={least!r} is no number: leave it out, or give 0")
    return fraction > 0 or least > 0 or given.get("evaluate_metrics_aggr_fn") is not None


def aggregated(updates: Sequence[Update], aggregate: Aggregate | None, weight: str) -> MetricRecord:
    """Return what a round's clients say of themselves, as one record.

    Args:
        updates: The answers that are averaged, with the weights they count for.
        aggregate: The app's own function, given each client's answer as FedAvg gives it; None for
            the weighted mean of each number over the clients that tell a finite one.
        weight: Name of the metric that answers are weighed by.

    Raises:
        FedveilError: The app's function returned no MetricRecord.
    """
    if aggregate is None:
        return MetricRecord(_means(updates, weight))
    contents = [_content(update, weight) for update in updates if update.content is not None]
    told = aggregate(contents, weight)
    if not isinstance(told, MetricRecord):
        raise FedveilError(
            f"train_metrics_aggr_fn returned a {type(told).__name__}: return a MetricRecord"
        )
    return told


def _content(update: Update, weight: str) -> RecordDict:
    """Return an answer whose claim counts for no more than it does in the mean."""
    assert update.content is not None
    own = RecordDict(dict(update.content))
    for name, metrics in update.content.metric_records.items():
        own[name] = MetricRecord({**metrics, weight: update.examples})
    return own


def _means(updates: Sequence[Update], weight: str) -> dict[str, _Told]:
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    means: dict[str, _Told] = {}
    for name in names:
        if name in (weight, _ROUND):
            continue
        told = [(u.metrics[name], u.examples) for u in updates if name in u.metrics]
        numbers = [(float(v), n) for v, n in told if isinstance(v, int | float)]
        lists = [([float(part) for part in v], n) for v, n in told if isinstance(v, list)]
        numbers = [(value, n) for value, n in numbers if math.isfinite(value)]
        lists = [(value, n) for value, n in lists if all(map(math.isfinite, value))]
        if numbers and not lists:
            means[name] = _mean(numbers)
        elif lists and not numbers and len({len(value) for value, _ in lists}) == 1:
            columns = zip(*(value for value, _ in lists), strict=True)
            counts = [n for _, n in lists]
            means[name] = [_mean(list(zip(column, counts, strict=True))) for column in columns]
    return means


def _mean(terms: Sequence[tuple[float, float]]) -> float:
    total = sum(count for _, count in terms)
    # Divided first: two large finite numbers have a mean, though no sum.
    return sum(value * (count / total) for value, count in terms)
