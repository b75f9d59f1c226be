"""The ServerApp that every engine runs: strategy, rounds, report and checkpoints."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedveil.analytic import AnalyticClassifier, load_classifier
from fedveil.analytic.privacy import NOISE_FROM, NoisyRelease, traceable
from fedveil.copies.fingerprint import FINGERPRINT_STRENGTH, Fingerprint
from fedveil.copies.noise import NoiseKey
from fedveil.data import Dataset, Images, load_dataset, parse_partition
from fedveil.data.augmentation import parse_augmentation
from fedveil.data.partition import partition
from fedveil.defenses import check_defense, parse_defense
from fedveil.defenses.dp_sgd import ADJACENCY, DPSGD
from fedveil.errors import FedveilError
from fedveil.features import MapDescription
from fedveil.federation.acceptance import Acceptance
from fedveil.federation.distillation import distil_job, student_of
from fedveil.federation.engines.eager_grid import EagerGrid
from fedveil.federation.gains import gain_of
from fedveil.federation.job import Evaluation, Job, shares_of
from fedveil.federation.roster import Client, round_size
from fedveil.federation.secagg.server import SecureAggregation, check_round_size
from fedveil.federation.strategies.analytic import Analytic
from fedveil.federation.strategies.ensemble_distillation import EnsembleDistillation
from fedveil.federation.strategies.fedavg import Distribution, Resume, SeededFedAvg
from fedveil.federation.task import ClientTask
from fedveil.federation.trial import Trial, try_answers, try_out, try_sums
from fedveil.models import check_sendable
from fedveil.runs.archive import Archive
from fedveil.runs.config import STRATEGIES, TrainConfig
from fedveil.runs.directory import (
    BestRound,
    Checkpoint,
    RoundRecord,
    RunDirectory,
    StrategyState,
    versions,
)
from fedveil.types import Weights
from fedveil.wording import quantity

SEEN_ALONE = "each client's own sums"
"""What the server sees of an analytic run's clients without secure aggregation."""

ANSWERS_ALONE = "each client's own answers"
"""The same of a protected run's."""

OnRound = Callable[[RoundRecord], None]

_FEWEST_TEST_IMAGES = 40
_NAMED = 20  # of the files that were left out


def prepare_job(config: TrainConfig) -> Job:
    """Load and check what a new run is made of, and try one step of it.

    Raises:
        FedveilError: A setting does not fit the data or the model, or a step fails.
    """
    job = load_job(config)
    student_of(job)
    shares = shares_of(config, job.dataset)
    strategy = build_strategy(job, Resume(), NoiseKey.generate())
    trial = Trial(
        job.model,
        job.dataset.train,
        len(job.dataset.classes),
        # Where each node has images of its own, nobody knows how many.
        tuple(shares or [2] * config.clients),
        ClientTask.of(config, job.dataset),
        strategy,
        _mark_strength(config),
    )
    if isinstance(strategy, Analytic):
        check_sums(strategy, config, shares)
        return replace(job, notes=tuple(try_sums(trial, strategy)))
    notes = try_out(trial)
    if isinstance(strategy, EnsembleDistillation):
        if strategy.release is not None:
            check_asked_once(config)
        try_answers(trial, strategy)
    return replace(job, notes=tuple(notes))


def check_sums(strategy: Analytic, config: TrainConfig, shares: Sequence[int]) -> None:
    """Refuse an analytic run whose clients would be asked twice, or refuse themselves.

    Raises:
        FedveilError: Says what to change.
    """
    check_asked_once(config)
    asked = round_size(config.clients, config.fraction)
    images = sum(sorted(shares)[:asked])
    if config.secure_aggregation and shares and images < strategy.least_images:
        raise FedveilError(
            f"a round's sum is of {images} images at least, and {strategy.layout.dimension} "
            f"features take {strategy.least_images} not to show single ones: give fewer --filters, "
            "a higher --fraction, or a lower --images-per-feature (at least 4)"
        )


def check_asked_once(config: TrainConfig) -> None:
    """Refuse more rounds than there are clients to ask, where each is asked once.

    Raises:
        FedveilError: Says what to change.
    """
    asked = round_size(config.clients, config.fraction)
    if config.engine != "deployed" and (config.rounds - 1) * asked >= config.clients:
        raise FedveilError(
            f"{config.rounds} rounds ask {asked} clients each, and each of the {config.clients} is "
            f"asked once: give --rounds {-(-config.clients // asked)} at most, or less --fraction"
        )


def load_job(config: TrainConfig) -> Job:
    """Load the data and build the model of a run that exists; check that the settings fit both.

    Raises:
        FedveilError: A setting does not fit the data or the model.
    """
    dataset = load_dataset(config.dataset, seed=config.seed)
    _check_test_split(config.dataset, dataset)
    split = split_test(dataset.test, config.calibration_images, seed=config.seed)
    model = strategy_of(config).architecture(config, dataset, split)
    check_sendable(model)
    scheme = parse_partition(config.partition)
    parse_augmentation(config.augment)
    partition(dataset.train.labels, clients=config.clients, scheme=scheme, seed=config.seed)
    check_defense(parse_defense(config.defense), model, dataset.shape)
    job = Job(config, dataset, split, model.eval())
    build_strategy(job, Resume(), NoiseKey.generate())
    return job


def _check_test_split(name: str, dataset: Dataset) -> None:
    if len(dataset.test) >= _FEWEST_TEST_IMAGES:
        return
    folds = len(dataset.train) // _FEWEST_TEST_IMAGES
    plain = re.sub(r"@[\d+]+/\d+$", "", name)
    advice = (
        f"set more training images aside for it: --dataset {plain}@1/{min(folds, 5)}"
        if folds >= 2
        else f"add images: {2 * _FEWEST_TEST_IMAGES} for training, besides those for testing"
    )
    raise FedveilError(
        f"the test split of {name} has {len(dataset.test)} images; at least "
        f"{_FEWEST_TEST_IMAGES} are needed, half to calibrate on and half to report on; {advice}"
    )


def outlook(job: Job) -> str:
    """Return in a sentence what a round of a run will be."""
    config, data = job.config, job.dataset
    asked = round_size(config.clients, config.fraction)
    split = (
        f"{len(job.evaluation.calibration):,} images to calibrate on, "
        f"{len(job.evaluation.report):,} to report on"
    )
    asking = f"{asked:,} of {quantity(config.clients, 'client')} a round"
    round_ = asking if asked == config.clients else f"{asking} (--fraction 1 asks all)"
    if config.engine == "deployed":
        return f"{len(data.classes)} classes; {round_}; {split}"
    scheme = parse_partition(config.partition)
    shares = partition(data.train.labels, clients=config.clients, scheme=scheme, seed=config.seed)
    sizes = sorted({len(share) for share in shares})
    each = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return (
        f"{len(data.classes)} classes, {len(data.train):,} training images: {each} a client; "
        f"{round_}; {split}"
    )


def split_test(test: Images, calibration_images: int, *, seed: int) -> Evaluation:
    """Divide the test split into calibration and report images, at random by ``seed``.

    Args:
        test: The split no client sees.
        calibration_images: How many to calibrate on; at most half of the split.
        seed: Same seed, same division.

    Raises:
        FedveilError: Fewer than 40 test images.
    """
    if len(test) < _FEWEST_TEST_IMAGES:
        raise FedveilError(
            f"the test split has {len(test)} images; at least {_FEWEST_TEST_IMAGES} are needed, "
            "half to calibrate on and half to report on"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(test), generator=generator)
    count = min(calibration_images, len(test) // 2)
    return Evaluation(calibration=test[order[:count]], report=test[order[count:]])


def strategy_of(config: TrainConfig) -> type[SeededFedAvg]:
    """Return the class of the strategy that a configuration names."""
    module, _, name = STRATEGIES[config.strategy].partition(":")
    found: type[SeededFedAvg] = getattr(import_module(module), name)
    return found


def build_strategy(job: Job, resume: Resume, key: NoiseKey) -> SeededFedAvg:
    """Return the strategy the configuration names, where an earlier process left it."""
    strategy = strategy_of(job.config).of_run(job, resume, key)
    strategy.acceptance = Acceptance(
        job.config.norm_limit or None, job.config.average, job.config.weight_limit or None
    )
    strategy.secure = _secure(job.config)
    return strategy


def _secure(config: TrainConfig) -> SecureAggregation | None:
    if not config.secure_aggregation:
        return None
    check_round_size(round_size(config.clients, config.fraction))
    return SecureAggregation(
        threshold=config.reconstruction_threshold,
        shares=config.key_shares,
        largest_change=config.largest_change,
        timeout=config.timeout,
    )


def kept_cap(config: TrainConfig) -> float | None:
    """Return the accuracy cap that a run's strategy keeps its copies under; None: it keeps none."""
    return config.cap if strategy_of(config).keeps_cap else None


def _fingerprint(job: Job, key: NoiseKey) -> Fingerprint | None:
    """Return what tells the clients' copies apart; the others have none unless asked for."""
    strength = _mark_strength(job.config)
    return Fingerprint.of(job.model, key, strength=strength) if strength else None


def _mark_strength(config: TrainConfig) -> float:
    if config.fingerprint is not None:
        return config.fingerprint
    return FINGERPRINT_STRENGTH if strategy_of(config).fingerprints else 0.0


class Recorder:
    """Turns each finished round into a line of ``rounds.jsonl`` and a checkpoint.

    Flower calls it after every round as the server's evaluation function.

    Args:
        job: The run.
        directory: Where it is recorded.
        strategy: The run's strategy.
        on_round: Told of every round; a progress bar, for instance.
        best: The best of the rounds that an earlier process completed.
    """

    def __init__(
        self,
        job: Job,
        directory: RunDirectory,
        strategy: SeededFedAvg,
        on_round: OnRound,
        best: BestRound | None = None,
    ) -> None:
        self.job = job
        self.directory = directory
        self.strategy = strategy
        self.on_round = on_round
        self.best = best
        self.rounds = directory.rounds()[: strategy.completed_rounds]
        self._started = time.perf_counter()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Record a round; round 0 is Flower's look at the initial model."""
        if server_round == 0:
            self._started = time.perf_counter()
            return None
        seconds = time.perf_counter() - self._started
        weights = arrays.to_torch_state_dict()
        record = self._record(self.strategy.completed_rounds + server_round, weights, seconds)
        self.rounds.append(record)
        self.directory.write_rounds(self.rounds)
        self.best = _better(self.best, record, weights)
        self.directory.write_checkpoint(
            Checkpoint(record.round, weights, self.strategy.state, self.best)
        )
        self.on_round(record)
        self._started = time.perf_counter()
        return MetricRecord({"accuracy": record.accuracy})

    def _record(self, round_number: int, weights: Weights, seconds: float) -> RoundRecord:
        sent, images = self.strategy.sent, self.job.config.report_images
        chooses = self.job.config.deliver == "best"
        assert sent is not None
        return RoundRecord(
            round=round_number,
            accuracy=self.job.accuracy(weights, images=images),
            copies=self._copies(sent, images),
            sigma=sent.sigma,
            calibration_evaluations=sent.evaluations,
            calibration_images=sent.images,
            calibration_seconds=sent.seconds,
            seconds=seconds,
            loss=self.strategy.loss,
            clients=self.strategy.averaged,
            refused=self.strategy.refused,
            bounded=self.strategy.bounded,
            calibration=self.job.calibration_accuracy(weights) if chooses else None,
        )

    def _copies(self, sent: Distribution, images: int) -> tuple[float, ...]:
        received = self.strategy.received(sent)
        return tuple(self.job.accuracy(copy, images=images) for copy in received)


def _better(best: BestRound | None, record: RoundRecord, weights: Weights) -> BestRound | None:
    found = record.calibration
    if found is None or (best is not None and found < best.calibration):
        return best
    return BestRound(record.round, found, weights)


def run_rounds(grid: Grid, job: Job, directory: RunDirectory, *, on_round: OnRound) -> None:
    """Train to the configured number of rounds, from the last checkpoint if there is one.

    Args:
        grid: Where the clients are.
        job: The run.
        directory: Where it is recorded.
        on_round: Told of every finished round.

    Raises:
        FedveilError: A round had no usable answer, or no noise reaches the cap.
    """
    with directory.locked("server"):
        _run_rounds(grid, job, directory, on_round)


def _run_rounds(grid: Grid, job: Job, directory: RunDirectory, on_round: OnRound) -> None:
    directory.secrets.check_writable()
    directory.note_images(job.dataset.digest)
    directory.sweep()
    last = directory.checkpoint() or Checkpoint(0, job.model.state_dict(), StrategyState())
    key = directory.noise_key()
    if last.round and isinstance(job.model, AnalyticClassifier):
        # The very map that the earlier sums are of, whatever this process would make anew.
        job = replace(job, model=load_classifier(last.weights))
    strategy = build_strategy(job, Resume(last.round, last.state), key)
    strategy.fingerprint = _fingerprint(job, key)
    strategy.archive = Archive.create(directory.path, key) if job.config.archive else None
    if parse_defense(job.config.defense).privacy is not None or job.config.epsilon is not None:
        strategy.started = partial(_note_release, directory)
    recorder = Recorder(job, directory, strategy, on_round, last.best)
    if last.round < job.config.rounds:
        strategy.start(
            grid,
            ArrayRecord(dict(last.weights)),
            num_rounds=job.config.rounds - last.round,
            timeout=job.config.timeout,
            train_config=ClientTask.of(job.config, job.dataset).to_record(),
            evaluate_fn=recorder,
        )
        last = directory.checkpoint() or last
    directory.write_model(last.delivered)
    summary = summarise(job, last, recorder.rounds, directory.releases())
    summary["sends"] = strategy.sends
    if (alone := strategy.server_alone(last.delivered_round)) is not None:
        summary["server_alone"] = _beside(job, last.delivered, alone)
    if isinstance(strategy, Analytic):
        summary["analytic"] = sums_in_words(strategy, job.config)
        if found := distil_job(job, last.delivered):
            directory.write_distilled(found.weights)
            told = ("model", "images", "accuracy")
            summary["analytic"]["distilled"] = {name: getattr(found, name) for name in told}
    if isinstance(strategy, EnsembleDistillation):
        summary["answers"] = answers_in_words(strategy, job.config)
    if len(history := directory.version_history()) > 1:
        summary["version_history"] = history
    directory.write_summary(summary)


def _beside(job: Job, delivered: Weights, alone: Weights) -> dict[str, Any]:
    """Return what ``summary.json`` says of a model of the server's own labelled images alone."""
    with_clients, without = job.right(delivered), job.right(alone)
    return {
        "images": len(job.evaluation.calibration),
        "accuracy": int(without.sum()) / len(without),
        **asdict(gain_of(with_clients, without)),
    }


def sums_in_words(strategy: Analytic, config: TrainConfig) -> dict[str, Any]:
    """Return what ``summary.json`` says of an analytic run's sums."""
    features, solved = MapDescription.of(strategy.model.features), strategy.outcome
    images = solved.images
    classes = strategy.layout.classes
    _, traced = traceable(features.dimension, images=images, public=images, classes=classes)
    return {
        "features": features.name,
        "feature_map_sha256": features.digest,
        "dimension": features.dimension,
        "images": solved.images,
        "clients": solved.clients,
        "images_per_feature": solved.images / features.dimension,
        "penalty": solved.head.penalty,
        "answer_bytes": 8 * strategy.layout.length,
        "noise": solved.noise,
        "traceable": None if solved.noise else traced,
        "balanced": None if (even := strategy.balanced_gain()) is None else asdict(even),
        "server_sees": "sums of a round's clients" if config.secure_aggregation else SEEN_ALONE,
    }


def answers_in_words(strategy: EnsembleDistillation, config: TrainConfig) -> dict[str, Any]:
    """Return what ``summary.json`` says of what a protected run's clients were asked."""
    shared = config.shared_rounds
    sees = "sums of a round's clients" if config.secure_aggregation else ANSWERS_ALONE
    return {
        "questions": len(strategy.unlabelled),
        "questions_sha256": strategy.digest,
        "question_bytes": strategy.unlabelled.nbytes,
        "answer_bytes": 8 * len(strategy.unlabelled) * strategy.classes,
        "clients": len(set(strategy.outcome.heard.tolist())),
        "noise": strategy.outcome.noise,
        "server_sees": f"{quantity(shared, 'round')} of models, then {sees}" if shared else sees,
    }


def _note_release(directory: RunDirectory, _: int, clients: Sequence[Client]) -> None:
    directory.note_release({client.partition: client.examples for client in clients})


def summarise(
    job: Job,
    last: Checkpoint,
    rounds: list[RoundRecord],
    releases: Sequence[Mapping[int, int | None]] = (),
) -> dict[str, Any]:
    """Return the content of ``summary.json``; accuracies are on all report images."""
    cap = kept_cap(job.config)
    noisy = [record for record in rounds if record.calibration_evaluations]
    evaluations = sum(record.calibration_evaluations for record in noisy)
    return {
        "accuracy": job.accuracy(last.delivered),
        "round": last.delivered_round,
        "last_accuracy": job.accuracy(last.weights),
        "chance": guessing(job.evaluation.report),
        "cap": cap,
        "copies_max": max(max(record.copies) for record in rounds),
        "rounds_over_cap": None if cap is None else sum(max(r.copies) > cap for r in rounds),
        "calibration_evaluations_per_round": evaluations / len(rounds),
        "calibration_share_of_time": sum(r.calibration_seconds for r in rounds)
        / sum(r.seconds for r in rounds),
        "seconds": sum(record.seconds for record in rounds),
        "privacy": _privacy(job, releases),
        "left_out": {
            "count": len(job.dataset.left_out),
            "first": list(job.dataset.left_out[:_NAMED]),
        },
        "remarks": list(job.dataset.remarks),
        "report_images": len(job.evaluation.report),
        "untested": untested(job),
        "report_doubles": int(job.evaluation.report.doubles_of(job.dataset.train).sum()),
        "calibration_images": len(job.evaluation.calibration),
        "seed": job.config.seed,
        "configuration": job.config.model_dump(),
        "versions": versions(),
    }


def untested(job: Job) -> list[str]:
    """Return the classes that are trained on, and that no accuracy here tells anything of."""
    names = job.dataset.classes
    trained, reported = (
        images.labels.bincount(minlength=len(names))
        for images in (job.dataset.train, job.evaluation.report)
    )
    return [name for name, *n in zip(names, trained, reported, strict=True) if n[0] and not n[1]]


def guessing(images: Images) -> float:
    """Return the accuracy of whoever always names the commonest class."""
    return float(images.labels.bincount().max()) / len(images)


def _no_epsilon(privacy: DPSGD, held: Mapping[int, Sequence[int | None]]) -> str | None:
    if not privacy.noise:
        return "no noise was added"
    if not held:
        return "it was not noted who was asked for updates"
    if any(None in counts for counts in held.values()):
        return "a client did not say how many images it has"
    return None


def privacy_of_sums(
    release: NoisyRelease, releases: Sequence[Mapping[int, int | None]]
) -> dict[str, Any]:
    """Return (ε, δ) of noisy sums or votes for each client that was asked, as often as it was.

    Args:
        release: What each answer is.
        releases: Who was asked in each round that was started, one that was killed too.
    """
    times = Counter(client for asked in releases for client in asked)
    clients = {str(client): release.spent(count) for client, count in sorted(times.items())}
    return {
        "epsilon": max(clients.values(), default=None),
        "delta": release.delta,
        "adjacency": release.adjacency,
        "unit": release.unit,
        "noise_multiplier": release.multiplier,
        "noise_from": NOISE_FROM,
        **({} if clients else {"reason": "it was not noted who was asked"}),
        "clients": clients,
    }


def _privacy(job: Job, releases: Sequence[Mapping[int, int | None]]) -> dict[str, Any] | None:
    """Return (ε, δ) of DP-SGD for an image of each client, and of the one that gave most away.

    Every update that a client was asked for counts, averaged, refused, or asked for again after a
    kill: it may have left its client. How many images a client holds is its own word, and where one
    gave none there is no ε.
    """
    config = job.config
    if sums := strategy_of(config).release_of(config):
        return privacy_of_sums(sums, releases)
    privacy = parse_defense(config.defense).privacy
    if privacy is None:
        return None
    told: dict[str, Any] = {"delta": privacy.delta, "adjacency": ADJACENCY}
    held: dict[int, list[int | None]] = {}
    for release in releases:
        for client, images in release.items():
            held.setdefault(client, []).append(images)
    if unknown := _no_epsilon(privacy, held):
        return {"epsilon": None, "reason": unknown, **told}

    def spent(counts: Sequence[int | None]) -> float:
        known = [count for count in counts if count is not None]
        taken = [(n, config.epochs * math.ceil(n / config.batch_size)) for n in known]
        return privacy.spent(taken, batch_size=config.batch_size)

    distinct = {tuple(sorted(counts)): spent(counts) for counts in held.values()}  # type: ignore[type-var]
    clients = {
        str(client): distinct[tuple(sorted(counts))]  # type: ignore[type-var]
        for client, counts in sorted(held.items())
    }
    return {"epsilon": max(clients.values()), **told, "clients": clients}


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run on a deployed SuperLink, from the run's directory.

    The run configuration holds ``out``, the run's directory, whose ``config.json`` has the rest.
    """
    out = context.run_config.get("out")
    if not out:
        raise FedveilError("the run configuration has no 'out', the directory of the run")
    directory = RunDirectory.open(Path(str(out)))
    job = load_job(directory.config)
    run_rounds(EagerGrid(grid), job, directory, on_round=lambda _: None)
