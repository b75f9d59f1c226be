"""DP-SGD: local training with differential privacy for single images."""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.defenses.protocol import Metadata
from fedveil.errors import FedveilError
from fedveil.models.inspect import BATCH_NORMS
from fedveil.secure_random import SecureGenerator

# Of Rényi divergences; the large ones are what much noise needs.
_ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 80, 128, 192, 256, 384, 512, 1024]

ADJACENCY = (
    "one image of a client added or removed; how many images a client has is taken as public"
)
"""What two neighbouring data sets are, for which ε and δ hold."""


def spent_together(steps: Iterable[tuple[float, float, int]], *, delta: float) -> float:
    """Return ε of steps of DP-SGD under any noise, for one image added or removed.

    Source: Mironov et al., "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019;
    the Rényi divergences of independent releases add up.

    Args:
        steps: Noise multiplier, part of the images a step takes (Poisson), and number of steps.
        delta: Probability with which the promise may fail, in (0, 1).

    Returns:
        ε; infinite where a step has no noise, 0 without a step.
    """
    from opacus.accountants import RDPAccountant

    merged: Counter[tuple[float, float]] = Counter()
    for noise, rate, count in steps:
        merged[noise, rate] += count
    if not merged:
        return 0.0
    if any(not noise for noise, _ in merged):
        return math.inf
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, count) for (noise, rate), count in merged.items()]
    return float(accountant.get_epsilon(delta=delta, alphas=_ORDERS))


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

    metadata: ClassVar = Metadata(
        attack="priors on images in ig, which compares directions",
        broken_by="none where ε is small: the guarantee holds; Hayes et al., NeurIPS 2023, bound "
        "reconstruction by it",
        strengths=("noise=0.3", "noise=1", "noise=3"),
    )

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
        return self.spent([(images, steps)], batch_size=batch_size)

    def spent(self, releases: Iterable[tuple[int, int]], *, batch_size: int) -> float:
        """Return ε of several releases of one client together.

        Args:
            releases: Of each the images the client held then, and the steps it took.
            batch_size: Expected images a step, B.

        Returns:
            As ``epsilon``.
        """
        taken = [(self.noise, min(1.0, batch_size / n), steps) for n, steps in releases if steps]
        return spent_together(taken, delta=self.delta)

    def check(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Refuse a model for which the promise would not hold, or that opacus cannot train.

        The promise is of single images, so what leaves must be a sum over images of what each
        gives alone: batch normalisation of any kind (frozen, without weights, without statistics)
        and anything else that mixes a batch is refused, and so is any module that carries numbers
        from image to image in a buffer, whose content no noise covers.

        Args:
            model: What clients train; its weights stay.
            shape: (C, H, W) of an image.

        Raises:
            FedveilError: Names the module or the buffer, and what to do.
        """
        for name, module in model.named_modules():
            if isinstance(module, BATCH_NORMS):
                raise FedveilError(
                    f"model {type(model).__name__} cannot train with DP-SGD: {name or 'it'}, a "
                    f"{type(module).__name__}, mixes the images of a batch, so no noise is enough; "
                    "use group normalisation (--model resnet-gn has it)"
                )
        own = copy.deepcopy(model).train()
        pixels = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        _check_no_memory(own, pixels[:2])
        _check_no_mixing(own, pixels)
        with torch.random.fork_rng(devices=[]):
            self._check_trainable(own, pixels[:2])

    def _check_trainable(self, model: nn.Module, pixels: Tensor) -> None:
        try:
            self.gradients(model, pixels, torch.zeros(len(pixels), dtype=torch.int64), expected=2)
        except FedveilError:
            raise
        except Exception as error:  # whatever opacus's hooks make of somebody's model
            reason = " ".join(str(error).split())[:200]
            raise FedveilError(
                f"model {type(model).__name__} cannot train with DP-SGD: {type(error).__name__}: "
                f"{reason}; in-place operations must not be (inplace=False), and layers be those "
                "that opacus knows"
            ) from None

    def gradients(
        self, model: nn.Module, pixels: Tensor, labels: Tensor, *, expected: int
    ) -> dict[str, Tensor]:
        """Return one private gradient by parameter name.

        Args:
            model: In the mode it trains in, without batch normalisation.
            pixels: Float [N, C, H, W]; N may be 0, which gives noise alone.
            labels: Int64 [N].
            expected: B, what the sum is divided by.

        Raises:
            FedveilError: The model mixes the images of a batch.
        """
        with _PerImage(model) as wrapped:
            if len(labels):
                loss = F.cross_entropy(wrapped(pixels), labels)
                loss.backward()  # type: ignore[no-untyped-call]
            self._privatise(model, expected, len(labels))
            return _taken(model)

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
            noise_multiplier=0.0,
            max_grad_norm=self.clip,
            expected_batch_size=expected,
        )
        optimiser.pre_step()
        # Not opacus's own noise: its generator has 32 bits of seed on a CPU.
        generator, length = SecureGenerator(), self.noise * self.clip / expected
        for parameter in trained:
            noise = generator.normal(*parameter.shape).to(parameter.device)
            assert parameter.grad is not None
            parameter.grad = (parameter.grad.double() + length * noise).to(parameter.dtype)


def _check_no_memory(model: nn.Module, pixels: Tensor) -> None:
    before = {name: value.clone() for name, value in _tensors(model)}
    with torch.no_grad():
        _forward(model, pixels)
    for name, value in _tensors(model):
        held = before.get(name)
        if held is None or value.shape != held.shape or not _equal(value, held):
            raise FedveilError(
                f"model {type(model).__name__} cannot train with DP-SGD: its {name} changes when "
                "images pass, and what it holds of them no noise covers; leave that module out, or "
                "use one without running statistics"
            )


def _check_no_mixing(model: nn.Module, pixels: Tensor) -> None:
    first, second, third = pixels[:1], pixels[1:2], pixels[2:]
    with torch.no_grad():
        one = _forward(model, torch.cat([first, second]))[0]
        other = _forward(model, torch.cat([first, third]))[0]
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise FedveilError(
            f"model {type(model).__name__} cannot train with DP-SGD: its answer to an image "
            "depends on the others in the batch, so no noise is enough; use layers that see each "
            "image alone"
        )


def _forward(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that dropout is the same in each try
        logits: Tensor = model(pixels)
    return logits


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = model.state_dict()
    return [(name, value) for name, value in state.items() if isinstance(value, Tensor)]


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))


class _PerImage:
    """opacus's hooks on a model, taken off again."""

    def __init__(self, model: nn.Module) -> None:
        from opacus import GradSampleModule

        try:
            self.wrapped: nn.Module = GradSampleModule(model, loss_reduction="mean")
        except (NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise FedveilError(
                f"model {type(model).__name__} cannot train with DP-SGD: {reason}; use layers that "
                "opacus knows, and group normalisation (--model resnet-gn has it)"
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
