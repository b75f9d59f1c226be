"""iDLG: DLG with the label read off the last layer's gradient."""

from dataclasses import dataclass
from typing import ClassVar

from fedveil.attacks.inversion.dlg import search
from fedveil.attacks.inversion.gradients import check_attackable, infer_labels
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses


@dataclass(frozen=True, kw_only=True)
class IDLG:
    """Infer the label, then minimise the squared distance of the gradients over the image.

    The search is that of ``DLG``, which also leaves out what a known sanitiser destroyed; the label
    is exact for a single image, whatever the search finds.

    Source: Zhao, Mopuri & Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, section 3.

    Args:
        steps: Steps of L-BFGS.
        restarts: Starts for each victim; the lowest loss is kept. The paper has one.
        together: Searches computed at once, of several victims and starts; memory grows with it.
        seed: Seeds the starts.

    Raises:
        FedveilError: On a call, a batch of more than one image.

    Example:
        >>> IDLG(steps=100)(observation).labels  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, sanitizer=True)

    steps: int = 100
    restarts: int = 1
    together: int = 64
    seed: int = 0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's image."""
        check_attackable(observation, attack="idlg", most=1)
        return search(
            observation,
            infer_labels(observation),
            steps=self.steps,
            restarts=self.restarts,
            together=self.together,
            seed=self.seed,
            progress=progress,
        )
