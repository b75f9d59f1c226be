"""What a client is told: its work, and nothing of the cap, the noise or the groups."""

from typing import Any

from flwr.app import ConfigRecord
from pydantic import BaseModel, ConfigDict, Field

from fedveil.data import Dataset
from fedveil.data.augmentation import parse_augmentation
from fedveil.federation.training import LocalTraining
from fedveil.runs.config import TrainConfig

UNLABELLED = "unlabelled"
"""Record of a message to a client that holds the server's images, uint8 [M, C, H, W]."""


class ClientTask(BaseModel):
    """The configuration record of a message to a client, read and checked.

    Attributes:
        dataset: Dataset of which the client holds a share.
        partition: How the dataset is shared out.
        defense: How the client protects its images, as ``fedveil.defenses.parse_defense`` reads it.
        model: Architecture.
        epochs: E.
        batch_size: B.
        learning_rate: η.
        decay: Whether η falls to zero over a client's steps.
        momentum: Momentum of local SGD.
        clip: Largest norm of a step's gradient.
        images: How many of a client's images a round of FedSGD uses; B of them where not given.
        repeat: Whether every such round uses the first round's.
        augment: How the client changes its images at random in every step.
        batch_statistics: Whether clients send back the running statistics of batch normalisation,
            which tell of their images; those they were sent come back otherwise.
        seed: Seeds the partition and, with round and client, the order of the images.
        server_round: The round, from 1; 0 in the first query.
        classes: Names of the classes in the order of their labels; for nodes with images of their
            own, whose folders need not hold every class.
        shape: (C, H, W) of an image; for the same nodes.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    dataset: str
    partition: str
    defense: str = "none"
    model: str
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    decay: bool = False
    momentum: float = Field(default=0.0, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    images: int | None = Field(default=None, ge=1)
    repeat: bool = False
    augment: str | None = None
    batch_statistics: bool = True
    seed: int = Field(ge=0)
    server_round: int = Field(default=0, ge=0)
    classes: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None

    @classmethod
    def from_record(cls, record: ConfigRecord) -> "ClientTask":
        """Read the record of a message; keys have - where names have _."""
        return cls.model_validate({key.replace("-", "_"): record[key] for key in record})

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset) -> "ClientTask":
        """Take what clients need out of a run's configuration and the server's dataset."""
        known = {"classes": dataset.classes, "shape": dataset.shape}
        # Only a deployed node can have images of its own; to the others it is no business.
        return cls.model_validate(
            config.model_dump() | (known if config.engine == "deployed" else {})
        )

    def to_record(self) -> ConfigRecord:
        """Return the record for a message; the strategy adds ``server-round``."""
        settings: dict[str, Any] = self.model_dump(exclude_none=True, exclude={"server_round"})
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        if not self.classes:
            del settings["classes"]
        return ConfigRecord({key.replace("_", "-"): value for key, value in settings.items()})

    @property
    def training(self) -> LocalTraining:
        """The local training this task asks for."""
        return LocalTraining(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            decay=self.decay,
            momentum=self.momentum,
            clip=self.clip,
            augmentation=parse_augmentation(self.augment),
        )
