"""What each study can be asked: a field is an option, its default, help and range.

No PyTorch is loaded here, as in ``fedveil.audit.settings``. A study that has other settings besides
inherits these; of one that is a list of arms they choose a part.
"""

from dataclasses import dataclass

from fedveil.errors import FedveilError
from fedveil.settings import CheckedSettings, option

KEEPS = (1, 3, 6, 10, 15, 21, 28, 64)
"""Coefficients kept of a block's 64 in the study of the transformation."""

SCENARIOS = ("worst", "round", "sum")
"""What the frontier attacks."""


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(CheckedSettings):
    """Which part of the noise study is measured, on what.

    Raises:
        FedveilError: A number out of range.
    """

    seeds: int = option(3, "Seeds 0, 1, …: a run of each arm for each.", ge=1)
    dataset: str = option("mnist@4+5/12", "What is reported on: NAME or a fold of it, NAME@k/n.")
    search_dataset: str = option("mnist@1+6/12", "What the settings are chosen on, with --search.")
    rounds: int = option(50, "Rounds of each run.", ge=1)
    arms: tuple[str, ...] = option(
        (), "One of the study's strategies.", flags=("--arm",), shown="all"
    )
    search: bool = option(False, "Also run the settings that were tried on the way.")


@dataclass(frozen=True, kw_only=True)
class DctOptions(CheckedSettings):
    """What is measured of the transformation.

    The paper does not say how many coefficients its figure 3 keeps.

    Raises:
        FedveilError: Nothing to measure.
    """

    images: int = option(100, "Images attacked for each keep.")
    seeds: int = option(3, "Training runs for each keep: seeds 0, 1, …", ge=1)
    dataset: str = option("cifar100", "What is attacked; losslessly stored images.")
    accuracy_dataset: str = option("cifar10", "What is learnt.")
    keeps: tuple[int, ...] = option(
        KEEPS, "Coefficients kept of 64.", flags=("--keep",), shown="1 to 64, eight"
    )
    figure_images: int = option(4, "Images of figure 3.", ge=1)
    figure_keep: int = option(6, "Coefficients kept in figure 3.")
    rounds: int = option(20, "Rounds of each training run.")
    epochs: int = option(1, "Local epochs a round.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps or len(set(self.keeps)) < len(self.keeps):
            raise FedveilError("name at least one --keep, and none twice")


@dataclass(frozen=True, kw_only=True)
class TraceOptions(CheckedSettings):
    """What leaks are traced.

    Raises:
        FedveilError: A number out of range.
    """

    dataset: str = option("mnist", "mnist, or digits for a quick look.")
    rounds: int = option(50, "Rounds of the run that is leaked.", ge=1)
    trials: int = option(3, "Leaks of each kind.", ge=1)
    innocents: int = option(1_000, "Innocent models traced.", ge=5)
    strength: float | None = option(
        None, "Strength of the fingerprints, as of fedveil train.", flags=("--fingerprint",)
    )
    workers: int | None = option(None, "Worker processes; one a core.")


@dataclass(frozen=True, kw_only=True)
class TheftOptions(CheckedSettings):
    """Which part of the theft study is measured, by which thieves.

    Raises:
        FedveilError: A number out of range.
    """

    seeds: int = option(3, "Runs of each protection: seeds 0, 1, …", ge=1)
    datasets: tuple[str, ...] = option((), "One of the study's.", flags=("--dataset",), shown="all")
    arms: tuple[str, ...] = option(
        (), "One of the study's protections.", flags=("--arm",), shown="all"
    )
    partitions: tuple[str, ...] = option(
        (), "iid or shards:2.", flags=("--partition",), shown="both"
    )
    rounds: int | None = option(None, "Rounds of each run, where not the study's.", ge=1)
    thieves: int = option(1, "Thieves of each run.", ge=1)
    colluders: tuple[int, ...] = option((1, 2, 5), "How many collude.", ge=1)
    labels: tuple[int, ...] = option((10, 50, 100, 600), "Labelled images of a thief.", ge=0)
    workers: int | None = option(None, "Worker processes of the audits.")


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(CheckedSettings):
    """What defences are measured, and how.

    Images stored as JPEG, as CIFAR-10's sometimes are, have lost part of what transformations
    remove: the worst case is better attacked on others.

    Raises:
        FedveilError: Nothing to measure.
    """

    dataset: str = option("cifar10", "What is learnt, and attacked.")
    leakage_dataset: str | None = option(
        None, "What is attacked in the worst case.", shown="the same"
    )
    images: int = option(96, "Images attacked for each row.")
    sum_images: int | None = option(
        None, "Images attacked under a sum.", shown="a batch of each client"
    )
    scenarios: tuple[str, ...] = option(
        SCENARIOS, "worst, round or sum.", flags=("--scenario",), shown="all"
    )
    seeds: int = option(3, "Training runs for each defence: 0, 1, …", ge=1)
    rounds: int = option(20, "Rounds of each training run.")
    defenses: tuple[str, ...] = option(
        (), "As of audit leakage.", flags=("--defense",), shown="all, at every strength"
    )
    worst_attacks: tuple[str, ...] = option(
        ("lm", "ig"), "Attacks of the worst case.", flags=("--attack",)
    )
    round_attacks: tuple[str, ...] = option(
        ("ig",), "Attacks of the realistic round.", flags=("--round-attack",)
    )
    batch: int = option(16, "Images of the realistic round.")
    inverse: bool = option(True, "Also learn, on test images, to undo transformations.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scenarios or not set(self.scenarios) <= set(SCENARIOS):
            raise FedveilError(
                f"--scenario {', '.join(self.scenarios) or 'nothing'} cannot be; allowed: "
                f"{', '.join(SCENARIOS)}"
            )
