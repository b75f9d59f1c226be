"""What each audit can be asked: a field is an option, its default, help and range.

No PyTorch is loaded here, so that a command's help is quick and a wrong setting refused at once.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedveil.errors import FedveilError
from fedveil.settings import CheckedSettings, option
from fedveil.types import UpdateKind

FEWEST_FOLLOWED = 4
"""Clients, the victim with them, of whom the others tell how scores vary."""

FEWEST = 20
"""Images in training, and others, of which it can be told how well they are told apart."""


@dataclass(frozen=True, kw_only=True)
class Watching(CheckedSettings):
    """Whom a server watches, and what its clients do meanwhile.

    The training images are divided among the clients at random. Under ``aggregate`` the server
    sees only the mean update of the victim and the clients after it. Over ``repeats`` rounds of
    federated averaging it follows the victim and all other clients, each of whom trains on the same
    images in every one of them.

    Raises:
        FedveilError: A setting out of range, images that make up no whole batches, or a victim that
            is none of the clients.
    """

    clients: int = option(10, "Clients in all.", ge=1)
    victim: int = option(0, "The client the server watches, from 0.")
    images: int = option(16, "Its images in all.", ge=1)
    batch: int = option(1, "How many of them it uses in a round.", ge=1)
    aggregate: int = option(
        1, "Clients whose sum only the server sees; --images are of them all.", ge=1
    )
    update: UpdateKind = option(
        "gradient",
        "What clients return: a gradient, the weights after one local step on the batch, or those "
        "after local training on it.",
    )
    epochs: int = option(1, "Local epochs of --update fedavg.", ge=1)
    batch_size: int = option(10, "Local minibatch of --update fedavg.", ge=1)
    # The longer the one step, the less the rounding of the weights hides; several must converge.
    learning_rate: float = option(
        None, "Of local steps.", shown="1 for step, 0.05 for fedavg", gt=0
    )
    repeats: int = option(
        1, "Rounds of --update fedavg on the same images, told from together.", ge=1
    )
    batch_statistics: bool = option(
        True,
        "Weights come back with batch normalisation's running statistics, as of most apps; fedveil "
        "train's clients leave them out.",
    )
    seed: int = option(0, "Seeds model, partition and order.")
    workers: int | None = option(None, "Worker processes; one a core.", ge=1)

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            rate = 0.05 if self.update == "fedavg" else 1.0
            object.__setattr__(self, "learning_rate", rate)
        super().__post_init__()
        if self.aggregate > self.clients:
            raise FedveilError(
                f"--aggregate {self.aggregate} is out of range: give 1 to {self.clients}, the "
                "number of clients"
            )
        together = self.batch * self.aggregate
        if self.images % together:
            raise FedveilError(
                f"--images {self.images} is no multiple of the {together} images of a round "
                f"(--batch times --aggregate): give {-(-self.images // together) * together}"
            )
        self._check_repeats()
        if not 0 <= self.victim < self.clients:
            raise FedveilError(
                f"--victim {self.victim} is no client: there are {self.clients}, "
                f"so give 0 to {self.clients - 1}"
            )

    def _check_repeats(self) -> None:
        if self.repeats == 1:
            return
        if self.update != "fedavg" or self.aggregate > 1 or self.batch != self.images:
            raise FedveilError(
                f"--repeats {self.repeats} follows one client's local training on the same images: "
                f"give --update fedavg, --batch {self.images}, as many as --images, and no "
                "--aggregate"
            )
        if self.clients < FEWEST_FOLLOWED:
            raise FedveilError(
                f"--repeats {self.repeats} compares the victim's updates with other clients': give "
                f"--clients {FEWEST_FOLLOWED} or more"
            )

    @property
    def rounds(self) -> int:
        """Rounds, each with other images of the victim's."""
        return self.images // (self.batch * self.aggregate)

    @property
    def victims(self) -> tuple[int, ...]:
        """Partitions of the clients whose sum is observed."""
        return tuple((self.victim + step) % self.clients for step in range(self.aggregate))


@dataclass(frozen=True, kw_only=True)
class LeakageSettings(Watching):
    """What is audited: whom the server watches, and by which attacks.

    Attributes:
        recorded: What was recorded of another app's federation; None: fedveil runs one.
        unchecked: What of a recording could not be checked, in a sentence.

    Raises:
        FedveilError: As of ``Watching``; or no attacks or defences.
    """

    attacks: tuple[str, ...] = option(
        ("lm",),
        "dlg, idlg, rgap, lm, layers, ig, ig-bn, fc, peel, ica, features, fish, fish-ig or latent, "
        "with its options as in ig:steps=600,restarts=2.",
        flags=("--attack",),
    )
    defenses: tuple[str, ...] = option(
        ("none",), "none, dct:keep=N and others of docs/defenses.md.", flags=("--defense",)
    )
    inverse: bool = option(False, "Also learn, on test images, to undo transformations.")
    recorded: str | None = None
    unchecked: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregate > 1 and self.update == "fedavg":
            raise FedveilError(
                "--aggregate with --update fedavg is not attacked: no attack of this package "
                "simulates several clients' local training at once; use gradient or step"
            )
        if not self.attacks or not self.defenses:
            raise FedveilError("name at least one --attack and one --defense")

    def described(self, dataset: str, model: str) -> dict[str, Any]:
        """Return what results depend on, by name: all settings but the number of workers."""
        own = {name: value for name, value in asdict(self).items() if name != "workers"}
        return {"dataset": dataset, "model": model, **own}


@dataclass(frozen=True, kw_only=True)
class TraceSettings(CheckedSettings):
    """How surely whoever is named is named.

    Raises:
        FedveilError: A chance that is none.
    """

    alpha: float = option(1e-6, "Chance to name anybody innocent.", gt=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class EgressSettings(CheckedSettings):
    """How a model is audited.

    Without shadows there is the loss alone. A shadow stops where it fits its images as the model
    fits its own.

    Raises:
        FedveilError: A number out of range.
    """

    images: int = option(1_000, "Training images that are told from as many others.", ge=FEWEST)
    shadows: int = option(4, "Models trained to compare with, an even number; 0: none.", ge=0)
    companions: int = option(4_000, "Further training images that each of them learns from.", ge=0)
    epochs: int = option(60, "Most passes of each of them.", ge=1)
    seed: int = option(0, "Seeds the images and the shadows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shadows % 2:
            raise FedveilError(
                f"--shadows {self.shadows} is odd: give an even number, so that every image is "
                "in half of them"
            )


@dataclass(frozen=True, kw_only=True)
class SumsSettings(CheckedSettings):
    """How sums are audited.

    Raises:
        FedveilError: A number out of range.
    """

    images: int = option(2_000, "Most images in the sums that are told from others.", ge=FEWEST)
    rebuilt: int = option(8, "Images that are rebuilt at most; 0: none.", ge=0)
    seed: int = option(0, "Seeds the images and the searches.")


@dataclass(frozen=True, kw_only=True)
class TheftSettings(CheckedSettings):
    """What is audited: every number of labels with every number of colluders.

    A thief without labels has images all the same. Labels are shared by all who collude.

    Attributes:
        run: Directory of the run.

    Raises:
        FedveilError: A number out of range.
    """

    run: Path
    labels: tuple[int, ...] = option(
        (0, 10, 50, 100, 600),
        "Labelled images of a thief, from 0; several, with commas between.",
        commas=True,
        ge=0,
    )
    colluders: tuple[int, ...] = option(
        (1, 2, 5),
        "Clients that put their copies together; several, with commas.",
        commas=True,
        ge=1,
    )
    thieves: int = option(3, "Draws of clients and images for each.", ge=1)
    seed: int = option(0, "Seeds the draws of clients and images.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 in self.labels:
            raise FedveilError(
                "--labels 1 is out of range: give 0, or at least 2, one to learn from and one to "
                "check with"
            )
