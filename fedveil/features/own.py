"""The user's own frozen model as a feature map."""

from collections.abc import Mapping

from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.features.protocol import FeatureMap, Options
from fedveil.models.factories import answer, described, import_factory
from fedveil.types import Shape


class OwnFeatures(FeatureMap):
    """A module that the user's factory returns, frozen.

    Server and clients each call their own copy of the factory; what its module holds is compared by
    digest and never sent.

    Args:
        shape: (C, H, W) of one image.
        path: ``package.module:factory``; ``factory(shape)`` returns a ``torch.nn.Module`` from
            float [N, C, H, W] in [0, 1] to [N, D].

    Raises:
        FedveilError: It cannot be imported or made, or returns no features.
    """

    def __init__(self, shape: Shape, path: str) -> None:
        module = _made(path, shape)
        super().__init__(shape, _dimension(path, module, shape))
        self.name = path
        self.module = module.eval().requires_grad_(False)

    @classmethod
    def rebuild(
        cls, shape: Shape, options: Options, tensors: Mapping[str, Tensor]
    ) -> "OwnFeatures":
        """Return what this machine's factory makes.

        Raises:
            FedveilError: As the constructor.
        """
        return cls(shape, str(options["path"]))

    @property
    def options(self) -> Options:
        """Where the factory is."""
        return {"path": self.name}

    def train(self, mode: bool = True) -> "OwnFeatures":
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, D]."""
        found: Tensor = self.module(pixels)
        return found.float()


def _made(path: str, shape: Shape) -> nn.Module:
    factory = import_factory(path, kind="backbone", call="factory(shape)")
    try:
        module: nn.Module = factory(shape)
    except FedveilError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FedveilError(
            f"backbone {path!r} could not be made for images of shape {shape} (C, H, W): {reason}; "
            "mend factory(shape), or give images of another size"
        ) from error
    return module


def _dimension(path: str, module: nn.Module, shape: Shape) -> int:
    found = answer(module, shape, kind="backbone", name=path)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        raise FedveilError(
            f"backbone {path!r} returns {described(found)} for two images; (2, D) is needed"
        )
    return int(found.shape[1])
