"""How surely the receivers of a leaked copy are named, and how surely nobody else is."""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedveil.attacks.theft.observation import mean_of
from fedveil.audit.hosts import Hosts
from fedveil.audit.trace import ALPHA, Lineup, Lineups, trace
from fedveil.federation.engines.worker import usable_cores
from fedveil.federation.job import Job
from fedveil.federation.server_app import load_job, prepare_job
from fedveil.federation.training import LocalTraining, train_locally
from fedveil.files import write_atomically
from fedveil.forks import in_processes
from fedveil.models import build_model
from fedveil.pictures import BLACK, BLUE, GREEN, GREY, ORANGE
from fedveil.progress import ProgressBars
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from fedveil.studies.measured import run_of
from fedveil.studies.settings import TraceOptions
from fedveil.studies.study import Piece, markdown
from fedveil.types import Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Treatment = Callable[[Weights, torch.Generator], Weights]

_IMAGES = 600  # as many as a client of the run has
_REPORT_IMAGES = 1_000
_INNOCENT = ("trained alone", "copies of another run", "models of a FedAvg run", "w")
_RUNS = ("leaked", "other", "fedavg")
_TRACED = "models traced"
_OF_ALL_COPIES = ("as it is", "fine-tuned, 20 epochs")


@dataclass(frozen=True, kw_only=True)
class TraceStudy(TraceOptions):
    """What is run.

    Attributes:
        clients: Clients of each run, a tenth of them a round.
        other_rounds: Rounds of the two runs innocent models come from; no more than ``rounds``.
        colluders: Numbers of clients that average their copies.
        seed: Of the run, the leaks and the innocent models.
    """

    name: ClassVar[str] = "trace"
    clients: int = 100
    other_rounds: int = 20
    colluders: tuple[int, ...] = tuple(range(1, 11))
    seed: int = 0

    def config(self, name: str) -> TrainConfig:
        """Return the settings of one of the runs: ``leaked``, ``other`` or ``fedavg``."""
        settings: dict[str, Any] = {
            "dataset": self.dataset,
            "clients": self.clients,
            "fraction": 0.1,
            "rounds": self.rounds if name == "leaked" else min(self.rounds, self.other_rounds),
            "deliver": "last",
            "learning_rate": 0.2,
            "clip": 20.0,
            "strategy": "fedavg" if name == "fedavg" else "noise-delta",
            "fingerprint": None if name == "fedavg" else self.strength,
            "workers": self.workers,
            "seed": self.seed + _RUNS.index(name),
        }
        return TrainConfig.check(settings)

    @property
    def command(self) -> str:
        """The command that runs this study."""
        return "fedveil reproduce trace"

    def check(self) -> None:
        """Refuse settings that could not be trained; nothing has been written yet."""
        prepare_job(self.config("leaked"))

    def pieces(self, out: Path) -> list[Piece]:
        """Return the three runs, and the tracing of every model."""
        return [
            *(Piece(name, run_of, (self.config(name), out / "runs" / name)) for name in _RUNS),
            Piece(_TRACED, _traced, (self, out), needs=_RUNS),
        ]

    def result(self, found: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Return the settings, a row for each kind of leak, and each kind of innocent model."""
        bench: Bench
        bench, pieces = found[_TRACED]
        delivered = found["leaked"][0].model()
        fingerprint = bench.entries[0].fingerprint
        traced = [piece for task, piece in pieces if isinstance(task, Innocent)]
        return {
            "study": asdict(self),
            "strength": fingerprint.strength if fingerprint else 0.0,
            "alpha": ALPHA,
            "tests": trace(delivered, bench.hosts, bench.among).tests,
            "accuracy_of_w": bench.thief.accuracy(delivered),
            "undone": _undone(bench),
            "rows": _gathered([piece for task, piece in pieces if isinstance(task, Leak)]),
            "innocent": [
                {
                    "kind": kind,
                    "models": len(of),
                    "accused": sum(model["accused"] for model in of),
                    "largest_z": [round(model["largest_z"], 3) for model in of],
                    "mean_z": fmean(model["mean_z"] for model in of),
                    "sd_z": math.sqrt(fmean(model["sd_z"] ** 2 for model in of)),
                }
                for kind in bench.innocents
                for of in [[model for model in traced if model["kind"] == kind]]
            ],
        }

    def table(self, result: Mapping[str, Any]) -> str:
        """Return who was named of each kind of leak, and of each kind of innocent model."""
        head = (
            *("leaked", "treated", "accuracy, 1 colluder", "named, 1 colluder", "2 to 5"),
            *("6 to 10", "least z", "falsely named"),
        )
        groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in result["rows"]:
            groups.setdefault((row["source"], row["treatment"]), []).append(row)
        innocent = (
            (
                *(of["kind"], str(of["models"]), str(of["accused"])),
                *(f"{max(of['largest_z']):.2f}", f"{of['mean_z']:+.3f} ± {of['sd_z']:.3f}"),
            )
            for of in result["innocent"]
        )
        leaks = markdown(head, (_cells(*kind, rows) for kind, rows in groups.items()))
        kinds = markdown(
            ("innocent models", "traced", "naming anybody", "largest z", "all z"), innocent
        )
        return f"{leaks}\n{kinds}"

    def figures(self, result: Mapping[str, Any], out: Path) -> dict[str, "Figure"]:
        """Draw how surely the guilty are told from the innocent."""
        return {"trace.png": _draw(result)}


@dataclass(frozen=True)
class Disguiser:
    """What thieves do to a model, with the run's data and architecture at hand.

    Attributes:
        job: The run's data and model.
    """

    job: Job

    def fine_tuned(self, epochs: int, *, learning_rate: float = 0.05) -> Treatment:
        """Train on as many images as a client has, in minibatches of 10."""
        settings = LocalTraining(
            epochs=epochs, batch_size=10, learning_rate=learning_rate, momentum=0.0, clip=20.0
        )

        def treat(weights: Weights, generator: torch.Generator) -> Weights:
            images = self.job.dataset.train
            chosen = torch.randperm(len(images), generator=generator)[:_IMAGES]
            self.job.model.load_state_dict(dict(weights))
            train_locally(self.job.model, images[chosen], settings, generator=generator)
            self.job.model.eval()
            state = self.job.model.state_dict()
            return {name: value.detach().clone() for name, value in state.items()}

        return treat

    def alone(self, seed: int, number: int) -> Weights:
        """Return a model that somebody trained from scratch for an epoch or two."""
        config, dataset = self.job.config, self.job.dataset
        fresh = build_model(
            config.model, dataset.shape, len(dataset.classes), seed=1_000 + seed + number
        )
        generator = _generator(f"alone {seed} {number}")
        return self.fine_tuned(1 + number % 2)(fresh.state_dict(), generator)

    def later(self, models: Sequence[Weights], number: int) -> Weights:
        """Return a model of a series; of further rounds through it, one that was treated."""
        model, name = models[number % len(models)], f"later {number}"
        if number < len(models):
            return model
        if number % 3 == 0:
            return self.fine_tuned(1)(model, _generator(name))
        drawn = random.Random(name)
        thinned = pruned(model, drawn.uniform(0.05, 0.95))
        return thinned if number % 3 == 1 else quantised(thinned, drawn.randint(3, 8))

    def accuracy(self, weights: Weights) -> float:
        """Return the accuracy on the first 1,000 report images."""
        return self.job.accuracy(weights, images=_REPORT_IMAGES)

    @property
    def treatments(self) -> dict[str, Treatment]:
        """What is done to a leaked copy, by name."""
        return {
            "as it is": lambda weights, generator: weights,
            "fine-tuned, 1 epoch": self.fine_tuned(1),
            "fine-tuned, 20 epochs": self.fine_tuned(20),
            "fine-tuned, 20 epochs, rate 0.2": self.fine_tuned(20, learning_rate=0.2),
            "pruned, 50 %": lambda weights, generator: pruned(weights, 0.5),
            "pruned, 90 %": lambda weights, generator: pruned(weights, 0.9),
            "8 bits": lambda weights, generator: quantised(weights, 8),
            "4 bits": lambda weights, generator: quantised(weights, 4),
        }


def pruned(weights: Weights, share: float) -> dict[str, Tensor]:
    """Set the smallest values of each weight matrix or kernel to 0.

    Source: Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural
    networks", NeurIPS 2015, section 3, without the training after.

    Args:
        weights: State by name.
        share: How many, in [0, 1].
    """
    return {
        name: _pruned(value, share) if value.dim() > 1 else value for name, value in weights.items()
    }


def quantised(weights: Weights, bits: int) -> dict[str, Tensor]:
    """Round each tensor to 2^bits - 1 evenly spaced values, symmetric about 0.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
    arXiv:1806.08342, section 2.2 (symmetric, per tensor).

    Args:
        weights: State by name.
        bits: At least 2.
    """
    return {
        name: _quantised(value, 2 ** (bits - 1) - 1) if value.is_floating_point() else value
        for name, value in weights.items()
    }


def _traced(
    study: TraceStudy, out: Path
) -> tuple["Bench", list[tuple["Leak | Innocent", dict[str, Any]]]]:
    """Trace every model of the study; each that is traced stays in ``pieces.jsonl``."""
    runs = {name: RunDirectory.open(out / "runs" / name) for name in _RUNS}
    archive = _archive(runs["leaked"])
    thief = Disguiser(load_job(runs["leaked"].config))
    innocents = _innocents(study, thief, runs, runs["leaked"].model())
    bench = Bench(
        study, thief, tuple(archive), Hosts.of(archive), tuple(Lineups(archive)), innocents
    )
    return bench, _done(bench, (*_models(study), *_leaks(study, thief)), out)


def _archive(run: RunDirectory) -> Archive:
    return Archive.open(run.path, run.noise_key())


def _last_copies(entries: Sequence[Entry], clients: Sequence[int]) -> Weights:
    return mean_of([_received(entries, client)[-1] for client in clients])


def _all_copies(entries: Sequence[Entry], clients: Sequence[int]) -> Weights:
    return mean_of([mean_of(_received(entries, client)) for client in clients])


def _received(entries: Sequence[Entry], client: int) -> list[Weights]:
    return [entry.received(client).weights for entry in entries if client in entry.assignment]


_SOURCES: Mapping[str, Callable[[Sequence[Entry], Sequence[int]], Weights]] = {
    "last copies": _last_copies,
    "all copies": _all_copies,
}


@dataclass(frozen=True)
class Leak:
    """One leak to be made and traced.

    Attributes:
        source: Which of their copies the colluders average.
        treatment: What they do to hide where it came from.
        colluders: How many they are.
        trial: Number of the repetition.
    """

    source: str
    treatment: str
    colluders: int
    trial: int


@dataclass(frozen=True)
class Innocent:
    """One innocent model to be made and traced.

    Attributes:
        kind: Where it comes from.
        number: Its number among its kind.
    """

    kind: str
    number: int


@dataclass(frozen=True)
class Bench:
    """What every leak and every innocent model is made and traced with.

    Attributes:
        study: The settings.
        thief: What is done to a model.
        entries: The archive of the run that is leaked from.
        hosts: What its clients were sent, before fingerprints.
        among: Its fingerprints.
        innocents: Makes innocent model number n, by kind.
    """

    study: TraceStudy
    thief: Disguiser
    entries: Sequence[Entry]
    hosts: Hosts
    among: Sequence[Lineup]
    innocents: Mapping[str, Callable[[int], Weights]]

    def run(self, task: Leak | Innocent) -> dict[str, Any]:
        """Make and trace one model."""
        return self.leak(task) if isinstance(task, Leak) else self.innocent(task)

    def leak(self, leak: Leak) -> dict[str, Any]:
        """Make a leak and trace it."""
        name = f"{self.study.seed} {leak}"
        everyone = sorted({client for entry in self.entries for client in entry.assignment})
        guilty = set(random.Random(name).sample(everyone, leak.colluders))
        averaged_copies = _SOURCES[leak.source](self.entries, sorted(guilty))
        model = self.thief.treatments[leak.treatment](averaged_copies, _generator(name))
        found = trace(model, self.hosts, self.among)
        others = [z for s in found.suspects if s.client not in guilty for z in s.scores.values()]
        return {
            **asdict(leak),
            "named": len(guilty & set(found.named)),
            "falsely": len(set(found.named) - guilty),
            "least_z": min(s.z for s in found.suspects if s.client in guilty),
            "others_z": {"mean": fmean(others), "sd": stdev(others)},
            "accuracy": self.thief.accuracy(model),
        }

    def innocent(self, task: Innocent) -> dict[str, Any]:
        """Make an innocent model and trace it."""
        found = trace(self.innocents[task.kind](task.number), self.hosts, self.among)
        z = [score for suspect in found.suspects for score in suspect.scores.values()]
        return {
            "kind": task.kind,
            "accused": bool(found.named),
            "largest_z": found.suspects[0].z,
            "mean_z": fmean(z),
            "sd_z": stdev(z),
        }


_bench: Bench | None = None


def _adopt(bench: Bench) -> None:
    # Inherited by the fork, so that the fingerprints are never copied.
    global _bench
    _bench = bench


def _on_bench(task: Leak | Innocent) -> tuple[str, dict[str, Any]]:
    assert _bench is not None
    return str(task), _bench.run(task)


def _done(
    bench: Bench, tasks: Sequence[Leak | Innocent], out: Path
) -> list[tuple[Leak | Innocent, dict[str, Any]]]:
    """Run the tasks that no earlier process of this study has run, and return all."""
    path = out / "pieces.jsonl"
    done = _pieces(path)
    missing = [task for task in tasks if str(task) not in done]
    write_atomically(path, "".join(json.dumps(piece) + "\n" for piece in done.items()).encode())
    workers = bench.study.workers or usable_cores()
    prepare, loads = partial(_adopt, bench), ("torch._dynamo",)  # by the first optimiser
    found = in_processes(_on_bench, missing, workers=workers, prepare=prepare, loads=loads)
    with path.open("a", buffering=1) as stream, ProgressBars(left=True) as bars:
        for name, piece in found:
            done[name] = piece
            stream.write(json.dumps((name, piece)) + "\n")
            bars(_TRACED, len(done), len(tasks))
    return [(task, done[str(task)]) for task in tasks]


def _pieces(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A kill may have cut the last line short.
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _leaks(study: TraceStudy, thief: Disguiser) -> Iterator[Leak]:
    """Yield every treatment of last copies, and two of the average of all copies."""
    kinds = [("last copies", treatment) for treatment in thief.treatments]
    kinds += [("all copies", treatment) for treatment in _OF_ALL_COPIES]
    for source, treatment in kinds:
        for colluders in study.colluders:
            for trial in range(study.trials):
                yield Leak(source, treatment, colluders, trial)


def _models(study: TraceStudy) -> Iterator[Innocent]:
    """Yield which innocent models are traced: two fifths trained alone, a fifth of each other."""
    fifth = study.innocents // 5
    for kind in _INNOCENT:
        count = study.innocents - 3 * fifth if kind == "trained alone" else fifth
        yield from (Innocent(kind, number) for number in range(count))


def _innocents(
    study: TraceStudy, thief: Disguiser, runs: Mapping[str, RunDirectory], delivered: Weights
) -> dict[str, Callable[[int], Weights]]:
    others = [
        entry.received(client).weights
        for entry in _archive(runs["other"])
        for client in sorted(entry.assignment)
    ]
    federated = [entry.copies[0] for entry in _archive(runs["fedavg"])]
    makers = (
        partial(thief.alone, study.seed),
        *(partial(thief.later, models) for models in (others, federated, [delivered])),
    )
    return dict(zip(_INNOCENT, makers, strict=True))


def _gathered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum up the trials of each kind of leak."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["source"], row["treatment"], row["colluders"])
        groups.setdefault(key, []).append(row)
    return [
        {
            "source": source,
            "treatment": treatment,
            "colluders": colluders,
            "trials": len(of),
            "guilty": colluders * len(of),
            "named": sum(row["named"] for row in of),
            "falsely": sum(row["falsely"] for row in of),
            "least_z": min(row["least_z"] for row in of),
            "others_mean_z": fmean(row["others_z"]["mean"] for row in of),
            "others_sd_z": math.sqrt(fmean(row["others_z"]["sd"] ** 2 for row in of)),
            "accuracy": fmean(row["accuracy"] for row in of),
        }
        for (source, treatment, colluders), of in groups.items()
    ]


def _undone(bench: Bench) -> dict[str, float]:
    """Return what training told of fingerprints: z along what their round moved the base by.

    It is standard normal where the next round's copies are independent of the fingerprints of the
    clients that they were made from.
    """
    z = [score for lineup in bench.among for score in lineup.moved]
    return {"clients": len(z), "mean_z": fmean(z), "sd_z": stdev(z)}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(name).getrandbits(62))


def _pruned(value: Tensor, share: float) -> Tensor:
    least = value.abs().flatten().kthvalue(max(1, round(share * value.numel()))).values
    return torch.where(value.abs() > least, value, torch.zeros_like(value))


def _quantised(value: Tensor, levels: int) -> Tensor:
    step = value.abs().max() / levels
    return torch.round(value / step) * step if step > 0 else value


def _threshold(tests: int) -> float:
    """Return the z at which the corrected p-value is ALPHA."""
    level = torch.tensor(ALPHA / tests, dtype=torch.float64)
    return -float(torch.special.ndtri(level))


def _draw(result: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    limit = _threshold(2 * result["tests"])  # half of alpha is for the first pass
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(f"{row['source']}, {row['treatment']}", []).append(row)
    styles = ("-", "--", ":")
    colors = (BLACK, BLUE, ORANGE, GREEN)
    for number, (name, rows) in enumerate(groups.items()):
        left.plot(
            [row["colluders"] for row in rows],
            [row["least_z"] for row in rows],
            label=name,
            color=colors[number % len(colors)],
            linestyle=styles[number // len(colors)],
        )
    left.axhline(limit, color=GREY, linewidth=1)
    left.set(yscale="log", xlabel="clients whose copies are averaged", ylabel="least z of a client")
    left.set_title("clients the leak came from")
    left.set_ylim(bottom=1)  # room for the legend
    left.legend(fontsize=7, ncols=2, loc="lower left")
    left.grid(alpha=0.2)
    largest = [z for group in result["innocent"] for z in group["largest_z"]]
    right.hist(largest, bins=40, color=BLUE)
    right.axvline(limit, color=GREY, linewidth=1)
    right.set(xlabel="largest z of any client", ylabel="innocent models")
    right.set_title(f"{len(largest):,} innocent models; grey: the threshold")
    right.grid(alpha=0.2)
    return figure


def _cells(source: str, treatment: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        source,
        treatment,
        f"{rows[0]['accuracy']:.1%}",
        *(_share(rows, low, high) for low, high in ((1, 1), (2, 5), (6, 10))),
        f"{min(row['least_z'] for row in rows):.1f}",
        str(sum(row["falsely"] for row in rows)),
    ]


def _share(rows: Sequence[Mapping[str, Any]], low: int, high: int) -> str:
    chosen = [row for row in rows if low <= row["colluders"] <= high]
    return f"{sum(r['named'] for r in chosen)} of {sum(r['guilty'] for r in chosen)}"
