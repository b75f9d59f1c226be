"""Accuracy against leakage, for every defence and strength: what to deploy.

Accuracy comes from federations that train to their end. Leakage comes from the best attack of the
suite, naive or adaptive, in three scenarios:

* ``worst``: a freshly initialised LeNet, one image a round, its gradient on the wire;
* ``round``: the model that the clients have trained under the same defence, a batch of 16 images,
  one local epoch, weights on the wire;
* ``sum``: the same where secure aggregation shows the server the sum over all clients only.

Beside what is rebuilt stands what every membership attack of the suite picks out, and which of them
picks out most.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.attacks.inversion import build_attack
from fedveil.audit.settings import LeakageSettings
from fedveil.audit.watch import ground_truth
from fedveil.data import load_dataset
from fedveil.defenses import DEFENSES, check_defense, parse_defense
from fedveil.defenses.protocol import metadata_of
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.federation.server_app import prepare_job
from fedveil.files import json_bytes, write_results
from fedveil.results import FOUND, IDENTIFIED, PICKED_OUT, TO_ORIGINAL, Term
from fedveil.runs.config import TrainConfig
from fedveil.runs.secrets import MODEL, RunSecrets
from fedveil.studies.measured import (
    averaging,
    report_of,
    settings_of,
    spread,
    trained,
    with_interval,
)
from fedveil.studies.settings import SCENARIOS, FrontierOptions
from fedveil.studies.study import Piece, markdown
from fedveil.types import UpdateKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (
    "none",
    *(
        f"{name}:{strength}"
        for name, defense in DEFENSES.items()
        for strength in metadata_of(defense).strengths
    ),
)
"""Every defence at every strength that it names."""
# A step on a batch is a local epoch of it; no attack simulates the epochs of several clients.
_UPDATES: Mapping[str, UpdateKind] = {"worst": "gradient", "round": "fedavg", "sum": "step"}
_REFUSED = "refused.json"
_MOST_DB = 50  # as drawn: an exact image is exact, however small the rounding


@dataclass(frozen=True, kw_only=True)
class FrontierStudy(FrontierOptions):
    """What is measured.

    Attributes:
        model: What is trained, and attacked in the realistic round.
        worst_model: What is attacked in the worst case.
        clients: Clients.
        victim: Which of them is attacked.
        batch_size: Images a local step, in training; the realistic round has one step of ``batch``.
        learning_rate: Of the local steps.
        clip: Largest norm of a local gradient; None for no limit.
        private_batch_size: Images a local step under DP-SGD, whose noise they share.
        private_learning_rate: Of those steps. Both were chosen on another fold's images.

    Raises:
        FedveilError: Nothing to measure, or a defence or attack that cannot be.
    """

    name: ClassVar[str] = "frontier"
    model: str = "cnn"
    worst_model: str = "lenet"
    clients: int = 10
    victim: int = 3
    batch_size: int = 10
    learning_rate: float = 0.05
    clip: float | None = 20.0
    private_batch_size: int = 250
    private_learning_rate: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.defenses:
            object.__setattr__(self, "defenses", SETTINGS)
        if self.images < 1 or self.images % self.batch:
            raise FedveilError(
                f"--images {self.images} is no multiple of the {self.batch} images of a round: "
                f"give {max(1, -(-self.images // self.batch)) * self.batch}"
            )
        if self.sum_images is not None and (
            self.sum_images < 1 or self.sum_images % (self.batch * self.clients)
        ):
            whole = self.batch * self.clients
            raise FedveilError(
                f"--sum-images {self.sum_images} is no multiple of the {whole} images of a sum: "
                f"give {max(1, -(-self.sum_images // whole)) * whole}"
            )
        if len(set(self.defenses)) < len(self.defenses):
            raise FedveilError(f"--defense {', '.join(self.defenses)}: name none twice")
        for defense in self.defenses:
            parse_defense(defense)
        for attack in (*self.worst_attacks, *self.round_attacks):
            build_attack(attack)

    @property
    def command(self) -> str:
        """The command that runs this study."""
        several = (
            ("defense", () if self.defenses == SETTINGS else self.defenses),
            ("attack", self.worst_attacks),
            ("round-attack", self.round_attacks),
            ("scenario", () if self.scenarios == SCENARIOS else self.scenarios),
        )
        summed = f" --sum-images {self.sum_images}" if self.sum_images else ""
        leakage = f" --leakage-dataset {self.leakage_dataset}" if self.leakage_dataset else ""
        repeated = "".join(f" --{name} {value}" for name, values in several for value in values)
        return (
            f"fedveil frontier --out DIR --dataset {self.dataset}{leakage} --images {self.images}"
            f"{summed} --seeds {self.seeds} --rounds {self.rounds} --batch {self.batch}"
            f"{'' if self.inverse else ' --no-inverse'}{repeated}"
        )

    def attacks(self, scenario: str) -> tuple[str, ...]:
        """Return the attacks of a scenario."""
        return self.worst_attacks if scenario == "worst" else self.round_attacks

    def subject(self, scenario: str) -> tuple[str, str]:
        """Return the names of the dataset and the model that a scenario attacks."""
        if scenario == "worst":
            return self.leakage_dataset or self.dataset, self.worst_model
        return self.dataset, self.model

    def audit(self, scenario: str, defense: str, attack: str) -> LeakageSettings:
        """Return the settings of one audit."""
        worst, added_up = scenario == "worst", self.clients if scenario == "sum" else 1
        return LeakageSettings(
            clients=self.clients,
            victim=self.victim,
            images=(self.sum_images or self.batch * added_up) if added_up > 1 else self.images,
            batch=1 if worst else self.batch,
            aggregate=added_up,
            batch_size=self.batch,
            attacks=(attack,),
            defenses=(defense,),
            update=_UPDATES[scenario],
            learning_rate=1.0 if worst else self.learning_rate,
            inverse=self.inverse,
            workers=1,
        )

    def training(self, defense: str, seed: int) -> TrainConfig:
        """Return the settings of one training run."""
        private = parse_defense(defense).privacy is not None
        return averaging(
            dataset=self.dataset,
            model=self.model,
            defense=defense,
            clients=self.clients,
            rounds=self.rounds,
            batch_size=self.private_batch_size if private else self.batch_size,
            learning_rate=self.private_learning_rate if private else self.learning_rate,
            clip=self.clip,
            seed=seed,
            workers=1,
        )

    def check(self) -> None:
        """Refuse what would fail hours later; nothing has been written yet."""
        for scenario in self.scenarios:
            settings = self.audit(scenario, "none", self.attacks(scenario)[0])
            ground_truth(load_dataset(self.subject(scenario)[0]), settings)
        job = prepare_job(self.training("none", 0))
        for defense in self.defenses:
            check_defense(parse_defense(defense), job.model, job.dataset.shape)

    def pieces(self, out: Path) -> list[Piece]:
        """Return every training run, and every audit of the models that they have made."""
        trainings = [
            Piece(
                _training(defense, seed),
                trained,
                (self.training(defense, seed), out, f"{_slug(defense)}-{seed}"),
            )
            for seed in range(self.seeds)
            for defense in self.defenses
        ]
        audits = [
            Piece(
                _audit(scenario, attack, defense),
                _attack,
                (self, scenario, defense, attack, out),
                needs=() if scenario == "worst" else (_training(defense, 0),),
            )
            for scenario in self.scenarios
            for defense in self.defenses
            for attack in self.attacks(scenario)
        ]
        return [*trainings, *audits]

    def result(self, found: Mapping[str, Any], out: Path) -> dict[str, Any]:
        """Return the settings, a row for each attack, and why some attacks were not run."""
        told = {
            kind: [
                row
                for defense in self.defenses
                for accuracy in [_accuracy(self, defense, found)]
                for scenario in self.scenarios
                for row in make(self, scenario, defense, accuracy, found)
            ]
            for kind, make in (("rows", _rows), ("membership", _recognitions))
        }
        return {**settings_of(self), **told, "refused": _refusals(out)}

    def table(self, result: Mapping[str, Any]) -> str:
        """Return the best attacks on each defence in each scenario: rebuilding, and membership."""
        head = (
            *("defence", "strength", "accuracy", "scenario", "best attack", IDENTIFIED.heading),
            *(TO_ORIGINAL.heading, "best membership attack", PICKED_OUT.heading, FOUND.heading),
        )
        closest = {
            (row["defense"], row["scenario"]): row for row in _membership(result) if row["best"]
        }
        best = (row for row in result["rows"] if row["best"])
        return markdown(
            head, (_cells(row, closest.get((row["defense"], row["scenario"]))) for row in best)
        )

    def figures(self, result: Mapping[str, Any], out: Path) -> dict[str, "Figure"]:
        """Draw accuracy against leakage, a column for each scenario."""
        return {"frontier.png": _draw(result["rows"], _membership(result))}


def _membership(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return what membership attacks tell; earlier versions asked one alone, and it is left out."""
    told: Sequence[Mapping[str, Any]] = result.get("membership", ())
    return told


def _training(defense: str, seed: int) -> str:
    return f"accuracy of {defense}, seed {seed}"


def _audit(scenario: str, attack: str, defense: str) -> str:
    return f"{scenario}: {attack} on {defense}"


def _attack(
    study: FrontierStudy, scenario: str, defense: str, attack: str, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return what an audit's rows tell, and its membership attacks; nothing where it refuses."""
    path = out / "leakage" / f"{scenario}-{_slug(attack)}-{_slug(defense)}"
    if (path / _REFUSED).exists():
        return {"rows": [], "membership": []}
    weights = RunSecrets(out / "runs" / f"{_slug(defense)}-0").path(MODEL)
    try:
        content = report_of(
            *study.subject(scenario),
            study.audit(scenario, defense, attack),
            path,
            None if scenario == "worst" else weights,
        )
    except InapplicableAttackError as error:
        write_results(path, {_REFUSED: json_bytes({"reason": str(error)})})
        return {"rows": [], "membership": []}
    return {kind: content.get(kind, []) for kind in ("rows", "membership")}


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def _accuracy(study: FrontierStudy, defense: str, found: Mapping[str, Any]) -> dict[str, Any]:
    runs = [found[_training(defense, seed)] for seed in range(study.seeds)]
    return {
        # Whoever uses the model knows the transformation and may apply it to their own images.
        **spread([run["transformed"] for run in runs]),
        "plain": spread([run["plain"] for run in runs]),
        "privacy": runs[0]["privacy"],
    }


def _rows(
    study: FrontierStudy,
    scenario: str,
    defense: str,
    accuracy: Mapping[str, Any],
    found: Mapping[str, Any],
) -> list[dict[str, Any]]:
    leaks = [
        row
        for attack in study.attacks(scenario)
        for row in found[_audit(scenario, attack, defense)]["rows"]
    ]
    if not leaks:
        raise FedveilError(
            f"no attack applies to {defense} in the scenario {scenario}, so its leakage is "
            "unknown; name another --attack or --round-attack"
        )
    best = max(leaks, key=lambda row: (row["identified"], row["psnr_original"]))
    point = _point(scenario, defense, accuracy)
    return [{**row, **point, "best": row is best} for row in leaks]


def _recognitions(
    study: FrontierStudy,
    scenario: str,
    defense: str,
    accuracy: Mapping[str, Any],
    found: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return what each membership attack tells; the best is chosen on what is reported."""
    audits = (found[_audit(scenario, attack, defense)] for attack in study.attacks(scenario))
    # Each audit of the scenario asks the same of the same images.
    told = next((one["membership"] for one in audits if one["membership"]), list[Any]())
    best = max(told, key=lambda row: row[PICKED_OUT.key], default=None)
    point = _point(scenario, defense, accuracy)
    return [{**row, **point, "best": row is best} for row in told]


def _point(scenario: str, defense: str, accuracy: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_defense(defense)
    return {
        "defense": defense,
        "family": parsed.family,
        "strength": parsed.strength,
        "scenario": scenario,
        "accuracy": accuracy["mean"],
        "accuracy_sd": accuracy["sd"],
        "accuracy_plain": accuracy["plain"]["mean"],
        "privacy": accuracy["privacy"],
    }


def _refusals(out: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["reason"]
        for path in sorted((out / "leakage").glob(f"*/{_REFUSED}"))
    }


# Okabe and Ito's colours and as many shapes, so that no family hangs on colour alone.
_LOOKS = (
    ("#000000", "*"),
    ("#0072B2", "o"),
    ("#56B4E9", "D"),
    ("#E69F00", "s"),
    ("#D55E00", "^"),
    ("#CC79A7", "v"),
    ("#009E73", "P"),
    ("#666666", "X"),
    ("#B8A800", "<"),
    ("#7A4FA3", ">"),
    ("#8C510A", "h"),
)
_STRENGTHS = re.compile(r"=([^,+]+(?:,[^+]+)?)")
_TITLES = {
    "worst": "Worst case: untrained LeNet, one image",
    "round": "Realistic round: trained model, a batch",
    "sum": "The same, the sum of all clients",
}


def _draw(rows: Sequence[Mapping[str, Any]], membership: Sequence[Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure = Figure(figsize=(7 * len(scenarios), 13), dpi=90, layout="constrained")
    panels = figure.subplots(3, len(scenarios), squeeze=False)
    for column, scenario in enumerate(scenarios):
        own = [row for row in rows if row["scenario"] == scenario]
        best = [row for row in own if row["best"]]
        member = [row for row in membership if row["scenario"] == scenario and row["best"]]
        found, near, picked = panels[0][column], panels[1][column], panels[2][column]
        _panel(found, best, IDENTIFIED, f"{IDENTIFIED.heading} among 100")
        _panel(near, best, TO_ORIGINAL, f"{TO_ORIGINAL.heading} (median, up to {_MOST_DB})")
        _panel(picked, member, PICKED_OUT, f"{PICKED_OUT.heading} of 100, best of the suite")
        found.set(title=_TITLES[scenario], ylim=(-0.05, 1.05))
        picked.set(ylim=(-0.05, 1.05))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.suptitle("Best attack of the suite. Better is right and below.", fontsize=10)
    return figure


def _look(family: str) -> tuple[str, str]:
    """Return colour and marker; of two joined the colour of the first and the second's marker."""
    places = [("none", *DEFENSES).index(part) for part in family.split("+")]
    # Beyond the last colour each comes again, with another shape.
    turn, color = divmod(places[0], len(_LOOKS))
    return _LOOKS[color][0], _LOOKS[(places[-1] + turn) % len(_LOOKS)][1]


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], score: Term, label: str) -> None:
    for family in dict.fromkeys(row["family"] for row in rows):
        own = sorted(
            (row for row in rows if row["family"] == family), key=lambda row: row["strength"]
        )
        color, marker = _look(family)
        x = [row["accuracy"] for row in own]
        y, lowest, highest = (
            [min(_MOST_DB, _end(row, score, end)) for row in own] for end in ("", "_low", "_high")
        )
        low = [value - end for value, end in zip(y, lowest, strict=True)]
        high = [end - value for value, end in zip(y, highest, strict=True)]
        axes.errorbar(
            x,
            y,
            xerr=[row["accuracy_sd"] for row in own],
            yerr=[[max(0, v) for v in low], [max(0, v) for v in high]],
            color=color,
            marker=marker,
            markersize=12 if family == "none" else 7,
            linewidth=1,
            elinewidth=0.6,
            alpha=0.9,
            label=family,
        )
        for row, across, up in zip(own, x, y, strict=True):
            text = " + ".join(_STRENGTHS.findall(row["defense"])) or "none"
            axes.annotate(
                text, (across, up), (4, 4), textcoords="offset points", fontsize=7, color=color
            )
    axes.set(xlabel="test accuracy (mean, sd over seeds)", ylabel=label)
    axes.grid(alpha=0.2)


def _end(row: Mapping[str, Any], score: Term, end: str) -> float:
    """Return an end of a column's interval, the value itself where one update has none."""
    value: float | None = row[f"{score.key}{end}"]
    return float(row[score.key]) if value is None else value


def _cells(row: Mapping[str, Any], member: Mapping[str, Any] | None) -> list[str]:
    accuracy = f"{row['accuracy']:.1%} ± {row['accuracy_sd']:.1%}"
    if row["privacy"]:
        accuracy += f", ε = {row['privacy']['epsilon']:.3g}"
    return [
        f"`{row['defense']}`",
        f"{row['strength']:.3g}",
        accuracy,
        row["scenario"],
        f"{row['attack']}, {'adaptive' if row['adaptive'] else 'naive'}",
        with_interval(row, IDENTIFIED, ".0%"),
        with_interval(row, TO_ORIGINAL, ".1f"),
        *_member_cells(member),
    ]


def _member_cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["not measured"] * 3
    told = row["strangers"]
    return [
        f"{row['attack']}, {'adaptive' if row['adaptive'] else 'naive'}",
        with_interval(row, PICKED_OUT, ".0%"),
        "cannot tell" if told[FOUND.key] is None else with_interval(told, FOUND, ".0%"),
    ]
