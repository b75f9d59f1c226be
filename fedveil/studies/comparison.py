"""Training runs that are compared: each arm with the same seeds, what differs from common settings.

Each run has its directory under ``out/runs``; one that is complete is not run again, and one that
was cut short goes on from its last round.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedveil.errors import FedveilError, UnreachableCapError
from fedveil.federation.server_app import prepare_job
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RoundRecord, RunDirectory
from fedveil.studies.measured import run_of, spread


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes:
        name: What the table calls it; the first arm of a partition is its baseline.
        partition: How the data is shared out.
        settings: What differs from the common settings.
    """

    name: str
    partition: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ArmRun:
    """What one run of an arm came to.

    Attributes:
        name: Of its directory.
        rounds: Its rounds.
        final: Accuracy of w on all report images, or of its last round where it broke off.
    """

    name: str
    rounds: Sequence[RoundRecord]
    final: float


@dataclass(frozen=True)
class Comparison:
    """A comparison of arms over seeds.

    Attributes:
        common: Settings of every run.
        arms: The lines of the comparison.
        seeds: A run each.
        prefix: Begins the names of the runs' directories.
    """

    common: Mapping[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    prefix: str = ""

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Return the settings of one run."""
        settings = {**self.common, **arm.settings, "partition": arm.partition, "seed": seed}
        return TrainConfig.check(settings)

    @property
    def partitions(self) -> tuple[str, ...]:
        """The partitions, in the order of the arms."""
        return tuple(dict.fromkeys(arm.partition for arm in self.arms))

    def on(self, partitions: Sequence[str]) -> Self:
        """Return the comparison on these partitions only."""
        return replace(self, arms=tuple(arm for arm in self.arms if arm.partition in partitions))

    def of(self, names: Sequence[str]) -> Self:
        """Return the baselines and the arms of some names only; of none for all.

        Raises:
            FedveilError: No arm has such a name.
        """
        known = list(dict.fromkeys(arm.name for arm in self.arms))
        check_known("--arm", names, known)
        kept = {*(names or known), known[0]}
        return replace(self, arms=tuple(arm for arm in self.arms if arm.name in kept))

    def check(self) -> None:
        """Refuse settings of an arm that could not be trained; nothing has been written yet."""
        for arm in self.arms:
            prepare_job(self.config(arm, self.seeds[0]))

    def run_name(self, arm: Arm, seed: int) -> str:
        """Return the name of a run's directory."""
        name = f"{self.prefix}{arm.name}-{arm.partition}-{seed}"
        return "".join(c if c.isalnum() else "-" for c in name)

    def run(self, arm: Arm, seed: int, out: Path) -> ArmRun:
        """Run one arm with one seed, from where it stopped; nothing where it is complete.

        A run whose noise cannot reach the cap ends early, and says so in ``ended.txt``.

        Raises:
            FedveilError: The directory holds a run of other settings, or what the training refuses.
        """
        name = self.run_name(arm, seed)
        path = out / "runs" / name
        try:
            directory, summary = run_of(self.config(arm, seed), path)
        except UnreachableCapError as error:
            if not (rounds := RunDirectory.open(path).rounds()):
                raise
            (path / "ended.txt").write_text(f"{error}\n")
            logging.getLogger(__name__).warning("%s: %s", name, error)
            return ArmRun(name, rounds, rounds[-1].accuracy)
        return ArmRun(name, directory.rounds(), float(summary["accuracy"]))


def finals(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Return a row's final accuracies, with their mean and standard deviation."""
    found = spread([run.final for run in runs])
    return {"final": found["seeds"], "final_mean": found["mean"], "final_sd": found["sd"]}


def check_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that a study does not have.

    Raises:
        FedveilError: Says which, and which it has.
    """
    for name in names:
        if name not in known:
            raise FedveilError(
                f"{option} {name!r} is not in the study; allowed: {', '.join(known)}"
            )
