"""DP-SGD: local training with differential privacy for single images."""

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.errors import FedveilError


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Clip every image's gradient and add normal noise to their sum, by opacus.

    One step samples each image with probability B/n (Poisson), clips each gradient to ``clip``,
    adds noise of the standard deviation ``noise · clip`` to the sum and divides by B.

    Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1; the
    accountant is opacus's Rényi accountant (Mironov et al., "Rényi Differential Privacy of the
    Sampled Gaussian Mechanism", 2019).

    Args:
        noise: Noise multiplier, at least 0; 0 clips only and promises nothing.
        clip: Largest norm of one image's gradient, above 0.
        delta: Probability with which the promise may fail, in (0, 1).

    Raises:
        FedveilError: A number out of range.
    """

    noise: float
    clip: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise FedveilError(f"noise={self.noise} is out of range: give 0 or more")
        if not 0 < self.clip < math.inf:
            raise FedveilError(f"clip={self.clip} is out of range: give a norm above 0")
        if not 0 < self.delta < 1:
            raise FedveilError(f"delta={self.delta} is out of range: give above 0 and below 1")

    @property
    def strength(self) -> float:
        """Noise multiplier."""
        return self.noise

    def epsilon(self, *, images: int, batch_size: int, steps: int) -> float:
        """Return ε of (ε, delta)-differential privacy for one image of a client.

        It holds against whoever sees every update of the client, and covers its images, not which
        client it is.

        Args:
            images: Images the client holds, n.
            batch_size: Expected images a step, B.
            steps: Steps in all rounds together.

        Returns:
            ε; infinite without noise, 0 without a step.
        """
        from opacus.accountants import RDPAccountant

        if not steps:
            return 0.0
        if not self.noise:
            return math.inf
        accountant = RDPAccountant()
        rate = min(1.0, batch_size / images)
        accountant.history = [(self.noise, rate, steps)]
        return float(accountant.get_epsilon(delta=self.delta))

    def check(self, model: nn.Module) -> None:
        """Refuse a model that mixes the images of a batch.

        Raises:
            FedveilError: It does.
        """
        with _PerImage(model):
            pass

    def gradients(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, *, expected: int
    ) -> tuple[dict[str, Tensor], float]:
        """Return one private gradient by parameter name, and the mean loss before it.

        The randomness is seeded by the operating system: whoever knew a seed could subtract the
        noise.

        Args:
            model: In the mode it trains in, without batch normalisation.
            pixels: Float [N, C, H, W]; N may be 0, which gives noise alone.
            labels: Int64 [N].
            expected: B, what the sum is divided by.

        Raises:
            FedveilError: The model mixes the images of a batch.
        """
        with _PerImage(model) as wrapped:
            loss = F.cross_entropy(wrapped(pixels), labels) if len(labels) else torch.zeros(())
            if len(labels):
                loss.backward()  # type: ignore[no-untyped-call]
            self._privatise(model, expected, len(labels))
            return _taken(model), float(loss.detach())

    def _privatise(self, model: nn.Module, expected: int, images: int) -> None:
        from opacus.optimizers import DPOptimizer

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            # A parameter no image reached has no gradient, and is given noise like the others.
            if not images or getattr(parameter, "grad_sample", None) is None:
                parameter.grad_sample = parameter.new_zeros(  # type: ignore[attr-defined]
                    images, *parameter.shape
                )
        optimiser = DPOptimizer(
            torch.optim.SGD(trained, lr=1.0),
            noise_multiplier=self.noise,
            max_grad_norm=self.clip,
            expected_batch_size=expected,
            generator=torch.Generator(trained[0].device).manual_seed(secrets.randbits(63)),
        )
        optimiser.pre_step()


class _PerImage:
    """opacus's hooks on a model, taken off again."""

    def __init__(self, model: nn.Module) -> None:
        from opacus import GradSampleModule

        try:
            self.wrapped: nn.Module = GradSampleModule(model, loss_reduction="mean")
        except (NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FedveilError(
                f"model {type(model).__name__} cannot train with DP-SGD: {reason}; use a model "
                "without batch normalisation (--model resnet-gn is one)"
            ) from error

    def __enter__(self) -> nn.Module:
        return self.wrapped

    def __exit__(self, *_: object) -> None:
        self.wrapped.to_standard_module()  # type: ignore[operator]


def _taken(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            gradients[name] = parameter.grad.detach()
            parameter.grad = None
            for trace in ("grad_sample", "summed_grad"):
                if hasattr(parameter, trace):
                    delattr(parameter, trace)
    return gradients
