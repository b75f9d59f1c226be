"""A strategy with a learning rate that falls, and the best model kept."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedveil.federation import EnsembleDistillation


class BestProtected(EnsembleDistillation):  # was: class BestFedAvg(FedAvg)
    """Halves the learning rate every round, and remembers the best model."""

    best_accuracy = 0.0
    best: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for training at half the last round's learning rate."""
        if server_round > 1:
            config["lr"] = float(config["lr"]) / 2
        return super().configure_train(server_round, arrays, config, grid)

    def note(self, accuracy: float, arrays: ArrayRecord) -> None:
        """Keep the model if it is the best so far."""
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best = accuracy, arrays
