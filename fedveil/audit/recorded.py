"""A leakage audit of a Flower app that fedveil is not part of, from what was recorded of it."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.inversion import LocalSteps, Observation, check_model
from fedveil.audit import membership
from fedveil.audit.leakage import (
    LeakageReport,
    Progress,
    Row,
    attacked,
    prepared,
    shown,
)
from fedveil.audit.membership import picked_out_over_rounds
from fedveil.audit.pieces import Pieces
from fedveil.audit.settings import FEWEST_FOLLOWED, LeakageSettings
from fedveil.audit.watch import local_steps, observation_from_records, public_knowledge
from fedveil.data import Dataset, Images
from fedveil.defenses import Defense, check_defense, parse_defense
from fedveil.errors import FedveilError
from fedveil.models import has_batch_norm
from fedveil.progress import say
from fedveil.runs.recordings import RECORD_KEY_FILE, Exchange, read_exchanges, recording_key
from fedveil.runs.state_files import read_state
from fedveil.wording import quantity

_PLAIN = Defense("none")
_OFF_THE_GRID = 0.01  # of a byte
_ONE_STEP, _ONE_STEP_NEAR = 0.01, 0.1  # rounding to 16 bits leaves that much near the images
_ORDERS = 4  # in which a client's images are trained on, to see how much depends on it
_MORE_ORDERS, _FEW_STEPS = 12, 32
_FARTHER, _LONGER, _LESS_ALIKE = 1.35, 1.2, 0.85
_TINY = 1e-30


@dataclass(frozen=True)
class Recorded:
    """Where the exchanges of another app's federation lie.

    Attributes:
        directory: What the recorders wrote; None where there is a pair of files.
        before, after: The model that was sent and the one that came back.
        truth: File of the images that were trained on; None where they were recorded, too.

    Raises:
        FedveilError: Neither or both are given.
    """

    directory: Path | None = None
    before: Path | None = None
    after: Path | None = None
    truth: Path | None = None

    def __post_init__(self) -> None:
        if (self.before is None) != (self.after is None):
            raise FedveilError("--before and --after belong together: give both")
        if (self.directory is None) == (self.before is None):
            raise FedveilError("give either --recorded DIR, or --before FILE and --after FILE")

    def exchanges(self, given: Images | None) -> tuple[Exchange, ...]:
        """Read the exchanges.

        Raises:
            FedveilError: They cannot be read.
        """
        if self.directory is None:
            assert self.before is not None
            assert self.after is not None
            return pair(self.before, self.after, given)
        key = recording_key()
        if key is None:
            raise FedveilError(
                f"--recorded {self.directory} is encrypted: put the path of its key into "
                f"{RECORD_KEY_FILE}"
            )
        return read_exchanges(self.directory, key)


def run_recorded_audit(
    dataset: str, model: str, settings: LeakageSettings, recorded: Recorded, *, out: Path | None
) -> LeakageReport:
    """Audit an app that fedveil is not part of, from what was recorded of it.

    Args:
        dataset: Where the images, the candidates and the strangers are from.
        model: What the app trains, as ``fedveil.models.build_model`` reads it.
        settings: What is audited; how many images there are follows from the recording.
        recorded: Where it lies.
        out: Directory for the results; ``None`` writes nothing.

    Raises:
        FedveilError: Anything the user can mend.
    """
    given = None if recorded.truth is None else read_truth(recorded.truth)
    everything = recorded.exchanges(given)
    exchanges, left = alike(of_one_client(everything, settings.victim))
    batch = exchanges[0].examples
    place = recorded.directory or f"{recorded.before} to {recorded.after}"
    told = unchecked(parse_defense(settings.defenses[0]))
    settings = replace(
        settings,
        images=batch * len(exchanges),
        batch=batch,
        update="step" if settings.update == "gradient" else settings.update,
        recorded=str(place),
        unchecked=told,
    )
    for sentence in filter(None, (left, told)):
        say(sentence)
    data, built = prepared(dataset, model, settings.seed)
    truth = truth_of(exchanges, data, given)
    pieces = Pieces.of(out, settings.described(dataset, model))
    with shown() as show:
        report = audit_recorded(
            exchanges,
            truth,
            built,
            settings,
            beside=everything,
            model_name=model,
            pieces=pieces,
            progress=show,
        )
    if out is not None:
        report.write(out)
    pieces.close()
    return report


@dataclass(frozen=True)
class Truth:
    """What recordings are scored by, never seen by an attack.

    Attributes:
        data: The dataset, the images that were trained on among its training images.
        used: Int64 [E, N], which of those are behind each exchange.
    """

    data: Dataset
    used: Tensor


def pair(before: Path, after: Path, truth: Images | None) -> tuple[Exchange, ...]:
    """Return two files of weights as the one exchange that was recorded.

    Raises:
        FedveilError: One cannot be read, they differ in names, or nothing says of how many images
            the change is.
    """
    sent, returned = (
        read_state(path, option=f"--{name}")
        for name, path in (("before", before), ("after", after))
    )
    if odd := sorted(sent.keys() ^ returned.keys()):
        raise FedveilError(
            f"--before {before} and --after {after} are not of one model: {odd[0]} is in one only"
        )
    if truth is None:
        raise FedveilError(
            "--before and --after need --truth FILE, the images that were trained on in between: "
            "what is rebuilt is scored by them"
        )
    return (Exchange(1, 0, sent, returned, len(truth)),)


def read_truth(path: Path) -> Images:
    """Read the images that were trained on: tensors ``images`` [M, C, H, W] and ``labels`` [M].

    Raises:
        FedveilError: The file holds something else.
    """
    held = read_state(path, option="--truth")
    images, labels = held.get("images"), held.get("labels")
    if (
        images is None
        or labels is None
        or images.ndim != 4
        or labels.shape != images.shape[:1]
        or not len(labels)
    ):
        raise FedveilError(
            f"--truth {path} must hold images [M, C, H, W], uint8 or floats in [0, 1], and labels "
            "[M], int64: torch.save({'images': …, 'labels': …}, FILE)"
        )
    if labels.is_floating_point() or bool((labels < 0).any()):
        raise FedveilError(f"--truth {path}: labels must be the numbers of classes, int64 from 0")
    return Images(_bytes(images, f"--truth {path}"), labels.to(torch.int64))


def of_one_client(exchanges: Sequence[Exchange], victim: int) -> tuple[Exchange, ...]:
    """Return the exchanges of the client that stands at place ``victim`` of those recorded.

    Raises:
        FedveilError: Fewer clients were recorded.
    """
    clients = sorted({exchange.client for exchange in exchanges})
    if not 0 <= victim < len(clients):
        raise FedveilError(
            f"--victim {victim}: recorded were {quantity(len(clients), 'client')} "
            f"({', '.join(map(str, clients[:10]))}); give 0 to {len(clients) - 1}"
        )
    return tuple(exchange for exchange in exchanges if exchange.client == clients[victim])


def alike(exchanges: Sequence[Exchange]) -> tuple[tuple[Exchange, ...], str | None]:
    """Return the exchanges of as many images as most are of, and what is left out, in words."""
    count, _ = Counter(exchange.examples for exchange in exchanges).most_common(1)[0]
    kept = tuple(exchange for exchange in exchanges if exchange.examples == count)
    if len(kept) == len(exchanges):
        return kept, None
    left = [exchange.server_round for exchange in exchanges if exchange.examples != count]
    return kept, f"rounds {left} are left out: they are of other than {quantity(count, 'image')}"


def truth_of(exchanges: Sequence[Exchange], data: Dataset, given: Images | None) -> Truth:
    """Return which images of a dataset were trained on, with those that were given added to it.

    Args:
        exchanges: All of as many images.
        data: The dataset.
        given: The images, where a file named them.

    Raises:
        FedveilError: Nothing says which they were, or they are none of the dataset's.
    """
    everything = Images.joined([data.train, data.test])
    if given is not None:
        everything = _added(everything, given, data)
    wanted = [_images(exchange, given, number) for number, exchange in enumerate(exchanges)]
    places = {image.numpy().tobytes(): place for place, image in enumerate(everything.raw)}
    found = [places.get(image.numpy().tobytes()) for images in wanted for image in images]
    if missing := sum(place is None for place in found):
        raise FedveilError(
            f"{missing} of {len(found)} recorded images are none of {data.name}: the app changes "
            "them (normalised, augmented, resized) before its model; record images in [0, 1] as "
            "they are, with the normalisation inside the model, or name them by --truth"
        )
    used = torch.tensor(found).view(len(exchanges), -1)
    # None that was trained on may stand among the images that nobody trained on.
    aside = torch.arange(len(data.train), len(data.train) + len(data.test))
    aside = aside[~torch.isin(aside, used)]
    rest = torch.ones(len(everything), dtype=torch.bool)
    rest[aside] = False
    moved = rest.cumsum(0) - 1
    return Truth(replace(data, train=everything[rest], test=everything[aside]), moved[used])


def _images(exchange: Exchange, given: Images | None, number: int) -> Tensor:
    if given is not None:
        start = number * exchange.examples
        own = given.raw[start : start + exchange.examples]
    elif exchange.images is not None:
        own = _bytes(exchange.images, f"the images of round {exchange.server_round}")
    else:
        raise FedveilError(
            "nothing says which images were trained on, and what is rebuilt is scored by them: "
            "record with record_messages(DIR, images=True), or name them by --truth FILE"
        )
    if len(own) != exchange.examples:
        raise FedveilError(
            f"round {exchange.server_round}: the client says "
            f"{quantity(exchange.examples, 'image')}, and "
            f"{len(own)} are there; augmented images cannot be told apart, so record without "
            "augmentation, or name the images by --truth FILE, round after round"
        )
    return own


def _added(everything: Images, given: Images, data: Dataset) -> Images:
    if given.raw.shape[1:] != everything.raw.shape[1:]:
        raise FedveilError(
            f"--truth holds images of shape {tuple(given.raw.shape[1:])}, {data.name} of "
            f"{tuple(everything.raw.shape[1:])}: name a --dataset of such images"
        )
    if int(given.labels.max()) >= len(data.classes):
        raise FedveilError(
            f"--truth holds label {int(given.labels.max())}, and {data.name} has "
            f"{len(data.classes)} classes, numbered from 0: name a --dataset of the app's classes"
        )
    return Images.joined([everything, given])


def _bytes(images: Tensor, what: str) -> Tensor:
    if images.dtype == torch.uint8:
        return images.contiguous()
    scaled = images.double() * 255
    whole = scaled.round()
    if not bool(((scaled - whole).abs() < _OFF_THE_GRID).all() and (whole >= 0).all()) or bool(
        (whole > 255).any()
    ):
        raise FedveilError(
            f"{what} are no pixels in [0, 1] of 8 bits (they span {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}): attacks rebuild pixels, so put the normalisation into "
            "the model, or name the images by --truth FILE"
        )
    return whole.to(torch.uint8).contiguous()


def audit_recorded(
    exchanges: Sequence[Exchange],
    truth: Truth,
    model: nn.Module,
    settings: LeakageSettings,
    *,
    beside: Sequence[Exchange] = (),
    model_name: str | None = None,
    pieces: Pieces = Pieces(),  # noqa: B008 (frozen)
    progress: Progress | None = None,
) -> LeakageReport:
    """Attack recorded exchanges as ``audit_leakage`` attacks those of its own federation.

    Args:
        exchanges: All of as many images.
        truth: What is scored by.
        model: The architecture, in the mode the client trains in; takes pixels in [0, 1].
        settings: What is audited; its local steps are those the client took.
        beside: What was recorded of other clients. Where the client used the same images in several
            rounds, in each of which three others answered the same model, membership is also told
            by all these rounds together.
        model_name: What the report calls the model; None for the name of its class.
        pieces: As of ``fedveil.audit.leakage.attacked``.
        progress: As of ``audit_leakage``.

    Raises:
        FedveilError: The model is another, the settings do not lead from the images to the update,
            or what an attack refuses.
    """
    data = truth.data
    classes = len(data.classes)
    check_model(model, data.shape, classes, images=settings.batch, batch_statistics=True)
    defenses = [parse_defense(text) for text in settings.defenses]
    if len(defenses) != 1:
        raise FedveilError("of a recording name one --defense: the one its client used, or none")
    (defense,) = defenses
    check_defense(defense, model, data.shape)
    reports = []
    for group, used in _same_model(exchanges, truth.used):
        seen = observed(group, model, settings, data, defense)
        for number, images in enumerate(used):
            check_settings(seen, number, data.train[images], settings, defense)
        reports.append(
            attacked(
                data, settings, defense, seen, used.flatten(), pieces=pieces, progress=progress
            )
        )
    report = replace(_one_after_the_other(reports), model=model_name or type(model).__name__)
    rounds = [
        observed(group, model, settings, data, defense)
        for group in _beside_others(exchanges, beside, settings)
    ]
    same = bool((truth.used.sort(dim=1).values == truth.used[0].sort().values).all())
    if not same or len(rounds) < 2:
        return report
    told = picked_out_over_rounds(defense, rounds, data, truth.used[0], seed=settings.seed)
    label = defense.label
    return replace(report, membership={label: (*report.membership[label], *told)})


def _beside_others(
    exchanges: Sequence[Exchange], beside: Sequence[Exchange], settings: LeakageSettings
) -> Iterator[list[Exchange]]:
    """Yield each exchange with those of other clients of its round, where they are enough.

    Others have answered the same model with as many local steps.
    """
    for own in exchanges:
        others = [
            one
            for one in beside
            if (one.server_round, _steps(one.examples, settings))
            == (own.server_round, _steps(own.examples, settings))
            and one.client != own.client
            and _bits(one) == _bits(own)
        ]
        if len(others) >= FEWEST_FOLLOWED - 1:
            yield [own, *others]


def _steps(images: int, settings: LeakageSettings) -> int:
    local = local_steps(settings)
    return 1 if local is None else local.steps(images)


def _same_model(
    exchanges: Sequence[Exchange], used: Tensor
) -> Iterator[tuple[list[Exchange], Tensor]]:
    """Yield the exchanges that answer the same model, which attacks take together."""
    groups: dict[bytes, list[int]] = {}
    for place, exchange in enumerate(exchanges):
        groups.setdefault(_bits(exchange), []).append(place)
    for own in groups.values():
        yield [exchanges[place] for place in own], used[own]


def _bits(exchange: Exchange) -> bytes:
    tensors = (exchange.sent[name].contiguous().flatten() for name in sorted(exchange.sent))
    # By bytes: numpy has no bfloat16.
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)


def observed(
    group: Sequence[Exchange],
    model: nn.Module,
    settings: LeakageSettings,
    data: Dataset,
    defense: Defense = _PLAIN,
) -> Observation:
    """Return what the server has of exchanges that answer the same model.

    Raises:
        FedveilError: ``model`` is not the one that was sent.
    """
    own = model.state_dict()
    names = list(own)
    sent = _named(group[0].sent, names)
    returned = [_named(exchange.returned, names) for exchange in group]
    for state in (sent, *returned):
        _check_alike(state, own)
    if settings.update == "gradient":
        raise FedveilError("--update gradient: a recording holds weights; give step or fedavg")
    return observation_from_records(
        model,
        ArrayRecord(sent),
        [ArrayRecord(state) for state in returned],
        shape=data.shape,
        classes=len(data.classes),
        steps=local_steps(settings),
        images=group[0].examples,
        knows=None if defense.transform is None else defense.transform.surrogate,
        sanitizer=public_knowledge(defense, model, data),
    )


def _named(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return recorded weights by the model's names; either may hold the other in a wrapper."""
    held = dict(state)
    for prefix in _prefixes(held, names):
        if {prefix + own for own in held} == set(names):
            return {name: held[name.removeprefix(prefix)] for name in names}
    for prefix in _prefixes(names, held):
        if {prefix + name for name in names} == held.keys():
            return {name: held[prefix + name] for name in names}
    odd = sorted(held.keys() ^ set(names))
    raise FedveilError(
        f"the recorded weights and --model's differ in their names ({', '.join(odd[:3])}, …): name "
        "the factory of the model that the app trains"
    )


def _prefixes(inner: Iterable[str], outer: Iterable[str]) -> Iterator[str]:
    """Yield what may stand before each inner name to make it an outer one."""
    first = next(iter(inner), "")
    return (name.removesuffix(first) for name in outer if first and name.endswith(first))


def _check_alike(recorded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in recorded.items():
        if (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
            raise FedveilError(
                f"the recorded {name} is {value.dtype} {tuple(value.shape)}, --model's "
                f"{own[name].dtype} {tuple(own[name].shape)}: name the model that the app trains, "
                "in the precision in which it sends weights"
            )


def check_settings(
    seen: Observation, number: int, images: Images, settings: LeakageSettings, defense: Defense
) -> None:
    """Refuse settings that do not lead from the images to the update: attacks on it say nothing.

    Of several steps the order is the client's own. So the images are trained on in a few other
    orders, and the client's change must be about as like these as they are like each other, and as
    long.

    Raises:
        FedveilError: They do not.
    """
    if unchecked(defense):
        return
    own = images.transformed(defense.transform)
    names = [name for name, p in seen.model.named_parameters() if p.requires_grad]
    theirs = {name: seen.gradients[name][number].double() for name in names}
    changes = [*_changes(seen, own)]
    _check_moved(theirs, changes[0])
    told, *mine = (
        torch.cat([change[name].flatten() for name in names]) for change in (theirs, *changes)
    )
    lengths = float(told.norm() / mine[0].norm().clamp(min=_TINY))
    angle = _cosine(told, mine[0])
    # What the layers near the images say is little of the whole, and tells most of them.
    first = next((name for name in names if theirs[name].ndim > 1), names[0])
    near = [change[first].flatten() for change in (theirs, *changes)]
    if seen.local is None:
        fits = _left(told, mine[0]) <= _ONE_STEP and _left(*near) <= _ONE_STEP_NEAR
    else:
        fits = _is_one_of(told, mine) and _is_one_of(near[0], near[1:])
    if not fits:
        fitting = settings.learning_rate * lengths
        raise FedveilError(
            "these settings do not lead from the client's images to what it returned: the change "
            f"is {lengths:.3g} times as long as it would be, at a cosine of {angle:.2f}. Give the "
            "app's own --epochs, --batch-size and --learning-rate"
            + (f" ({fitting:.3g} would fit)" if angle > 1 - _ONE_STEP else "")
            + "; plain gradient descent only, without momentum, another optimizer, augmentation or "
            "a change of the update that --defense does not name; an audit under other settings "
            "would find nothing and show nothing"
        )


def _changes(seen: Observation, images: Images) -> Iterator[dict[str, Tensor]]:
    """Yield what training on images comes to, as an observation has it, by a few orders."""
    local = seen.local
    if local is None:
        model = copy.deepcopy(seen.model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[]):
            loss = F.cross_entropy(model(images.pixels), images.labels)
        moving = [*named.values()]
        own = torch.autograd.grad(loss, moving, allow_unused=True, materialize_grads=True)
        yield {name: gradient.double() for name, gradient in zip(named, own, strict=True)}
        return
    length = local.learning_rate * local.steps(len(images))
    # Few steps differ much by their order, and cost little.
    orders = _ORDERS if local.steps(len(images)) > _FEW_STEPS else _MORE_ORDERS
    for seed in range(orders):
        # A copy: a forward pass in training mode moves batch statistics, which attacks go by.
        model = copy.deepcopy(seen.model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().double() for name, p in named.items()}
        _train(model, images, local, torch.Generator().manual_seed(seed))
        yield {name: (before[name] - p.detach().double()) / length for name, p in named.items()}


def _train(model: nn.Module, images: Images, local: LocalSteps, generator: torch.Generator) -> None:
    descent = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=local.learning_rate
    )
    with torch.random.fork_rng(devices=[]):
        for _ in range(local.epochs):
            order = torch.randperm(len(images), generator=generator)
            for batch in torch.split(order, local.batch_size):
                if len(batch) == 1 < local.batch_size and has_batch_norm(model):
                    continue  # it cannot train on one
                descent.zero_grad()
                loss = F.cross_entropy(model(images.pixels[batch]), images.labels[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                descent.step()


def _check_moved(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
    """Refuse an update in which a weight did not move that training moves.

    Raises:
        FedveilError: There is one.
    """
    still = [name for name, value in theirs.items() if not value.any() and mine[name].any()]
    if still:
        raise FedveilError(
            f"the client returned {still[0]} as it was sent"
            + (f", and {quantity(len(still) - 1, 'other weight')}" if len(still) > 1 else "")
            + ": it does not train what --model trains, or in a precision in which so small a "
            "change is lost; freeze that in the factory (requires_grad_(False)), else an audit "
            "would take it for a gradient of zero"
        )


def _is_one_of(told: Tensor, mine: Sequence[Tensor]) -> bool:
    """Whether a change is about as like the mean of others, and as long, as each of them."""
    lengths = [float(one.norm()) for one in mine]
    if not min(lengths) / _LONGER <= float(told.norm()) <= max(lengths) * _LONGER:
        return False
    total = torch.stack([*mine]).sum(dim=0)
    least, angle = min(_cosine(one, total - one) for one in mine), _cosine(told, total)
    return angle >= _LESS_ALIKE * least and 1 - angle**2 <= _ONE_STEP + _FARTHER * (1 - least**2)


def _left(told: Tensor, mine: Tensor) -> float:
    """Return what of a change another does not explain, as a share of its square."""
    return float((mine - told).square().sum() / told.square().sum().clamp(min=_TINY))


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()).clamp(min=_TINY))


def unchecked(defense: Defense) -> str | None:
    """Say so where an update was changed on purpose: that hides what was declared wrongly."""
    if defense.sanitizer is None and defense.soteria is None and defense.privacy is None:
        return None
    return (
        f"{defense.label} changes the update, so whether --learning-rate, --epochs and "
        "--batch-size of this recording are the app's own could not be checked; under wrong ones "
        "an audit finds nothing and shows nothing"
    )


def _one_after_the_other(reports: Sequence[LeakageReport]) -> LeakageReport:
    """Return reports on different images of one defence as one."""
    first = reports[0]
    rows = [
        Row(
            row.attack,
            row.defense,
            row.adaptive,
            torch.cat([report.rows[place].reconstructions for report in reports]),
            torch.cat([report.rows[place].loss for report in reports]),
            {
                name: torch.cat([report.rows[place].scores[name] for report in reports])
                for name in row.scores
                if all(name in report.rows[place].scores for report in reports)
            },
            {
                name: torch.cat([report.rows[place].floors[name] for report in reports])
                for name in row.floors
                if all(name in report.rows[place].floors for report in reports)
            },
            sum(report.rows[place].untold for report in reports),
        )
        for place, row in enumerate(first.rows)
    ]
    return replace(
        first,
        originals=torch.cat([report.originals for report in reports]),
        trained={
            label: torch.cat([report.trained[label] for report in reports])
            for label in first.trained
        },
        rows=tuple(rows),
        unread=tuple(dict.fromkeys(one for report in reports for one in report.unread)),
        membership={
            label: membership.joined([report.membership[label] for report in reports])
            for label in first.membership
        },
    )
