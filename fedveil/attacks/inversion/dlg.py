"""DLG, the published joint search for image and label; iDLG, which reads the label off first."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedveil.attacks.inversion.gradients import (
    GradientMap,
    check_attackable,
    infer_labels,
    surviving,
)
from fedveil.attacks.inversion.lbfgs import Problems
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress, Uses
from fedveil.attacks.inversion.subspace import Subspace, range_of

_INNER = 20
_HISTORY = 100

_Slope = Callable[[Tensor, Tensor | None, dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DLG:
    """Minimise the squared distance of the gradients over dummy images and dummy labels.

    L-BFGS with learning rate 1 and a history of 100, in PyTorch's form, whose one step makes up to
    20 iterations without a line search. "100 iterations" is read as 100 such steps, as the
    published code counts. Images and label logits start from a standard normal distribution; the
    labels are probabilities by softmax. A search stops early only where going on changes nothing:
    when a step leaves the loss as it was, or when it is no longer finite (the last finite images
    are returned). Searches of several victims and starts are computed together; each keeps its own
    curvature pairs and stops on its own loss, as if it were alone. What a known sanitiser of the
    update destroyed is no part of the distance.

    Source: Zhu, Liu & Han, "Deep Leakage from Gradients", NeurIPS 2019, algorithm 1 and section 4.

    Args:
        steps: Steps of L-BFGS.
        restarts: Starts for each victim; the lowest loss is kept. The paper has one.
        together: Searches computed at once, of several victims and starts; memory grows with it.
        seed: Seeds the starts.

    Shape: any batch, float32.

    Example:
        >>> DLG(steps=100)(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, sanitizer=True)

    steps: int = 100
    restarts: int = 1
    together: int = 64
    seed: int = 0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images and labels."""
        check_attackable(observation, attack="dlg", most=None)
        return self.search(observation, None, progress)

    def search(
        self, observation: Observation, labels: Tensor | None, progress: Progress | None
    ) -> Inversion:
        """Run the published search for every victim and start.

        Args:
            observation: What the attacker has.
            labels: Int64 [V, N] where they are known; None to search for them too.
            progress: Called after each step of the searches that go on together.
        """
        device = next(observation.model.parameters()).device
        starts = _Starts.drawn(observation, labels, self.restarts, self.seed, device)
        runs: list[tuple[Tensor, Tensor, Tensor]] = []
        seconds: list[Tensor] = []
        for part in torch.split(torch.arange(len(starts.victims)), self.together):
            begin = time.perf_counter()
            done = int(part[0]) // self.restarts

            def show(finished: int, loss: float, done: int = done) -> None:
                if progress:
                    progress(done + finished // self.restarts, observation.victims, loss)

            runs.append(_descend(observation, starts.select(part.to(device)), self.steps, show))
            seconds.append(torch.full((len(part),), (time.perf_counter() - begin) / len(part)))
        flat, losses, spent = (torch.cat(column) for column in zip(*runs, strict=True))
        best = losses.reshape(-1, self.restarts).argmin(dim=1)
        chosen = torch.arange(observation.victims, device=device) * self.restarts + best
        images, logits = starts.read(flat[chosen])
        return Inversion(
            images=images.double().cpu(),
            labels=(logits.argmax(dim=-1) if labels is None else labels).cpu(),
            loss=losses[chosen].double().cpu(),
            seconds=torch.cat(seconds).reshape(-1, self.restarts).sum(dim=1),
            iterations=spent.reshape(-1, self.restarts).sum(dim=1).cpu(),
        )


@dataclass(frozen=True, kw_only=True)
class IDLG(DLG):
    """Infer the label, then minimise the squared distance of the gradients over the image.

    The search is that of ``DLG``, which also leaves out what a known sanitiser destroyed; the label
    is exact for a single image, whatever the search finds.

    Source: Zhao, Mopuri & Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, section 3.

    Args:
        steps: As of ``DLG``, and so the others.
        restarts: Starts for each victim.
        together: Searches computed at once.
        seed: Seeds the starts.

    Raises:
        FedveilError: On a call, a batch of more than one image.

    Example:
        >>> IDLG(steps=100)(observation).labels  # doctest: +SKIP
    """

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's image."""
        check_attackable(observation, attack="idlg", most=1)
        return self.search(observation, infer_labels(observation), progress)


@dataclass(frozen=True)
class _Starts:
    """Where searches begin: images' coordinates and, where labels are unknown, their logits.

    Attributes:
        flat: Float32 [S, n].
        victims: Int64 [S], whose gradient each search is for.
        labels: Int64 [S, N] where known.
        subspace: What the coordinates are of.
        images: Images in a victim's batch, N.
    """

    flat: Tensor
    victims: Tensor
    labels: Tensor | None
    subspace: Subspace
    images: int

    @classmethod
    def drawn(
        cls,
        observation: Observation,
        labels: Tensor | None,
        restarts: int,
        seed: int,
        device: torch.device,
    ) -> "_Starts":
        subspace = range_of(observation.knows, observation.shape)
        subspace = subspace.to(torch.zeros((), device=device))
        generator = torch.Generator().manual_seed(seed)
        victims = torch.arange(observation.victims).repeat_interleave(restarts).to(device)
        rows = []
        for _ in victims:
            noise = torch.randn(observation.images, *observation.shape, generator=generator)
            logits = torch.randn(observation.images, observation.classes, generator=generator)
            unknowns = subspace.coordinates(noise.to(device)).flatten()
            free = (
                unknowns
                if labels is not None
                else torch.cat([unknowns, logits.flatten().to(device)])
            )
            rows.append(free)
        own = None if labels is None else labels.to(device)[victims]
        return cls(torch.stack(rows), victims, own, subspace, observation.images)

    def select(self, which: Tensor) -> "_Starts":
        labels = None if self.labels is None else self.labels[which]
        return replace(self, flat=self.flat[which], victims=self.victims[which], labels=labels)

    def read(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [..., N, C, H, W] and logits [..., N, classes], which may be none."""
        size = self.subspace.size * self.images
        unknowns = flat[..., :size].reshape(*flat.shape[:-1], self.images, -1)
        return self.subspace.images(unknowns), flat[..., size:].reshape(
            *flat.shape[:-1], self.images, -1
        )


def _descend(
    observation: Observation, starts: _Starts, steps: int, show: Callable[[int, float], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where searches end, [S, n], their relative loss, [S], and the steps made, [S]."""
    device = starts.flat.device
    measure = GradientMap.of(observation, dtype=torch.float32, device=device)
    observed = {
        name: observation.gradients[name].to(device, torch.float32)[starts.victims]
        for name in measure.parameters
    }
    sanitizer = observation.sanitizer

    def length(own: dict[str, Tensor]) -> Tensor:
        _, left = surviving(own, own, sanitizer)
        return sum((value.square().sum() for value in left.values()), starts.flat.new_zeros(()))

    size = vmap(length)(observed).clamp_min(1e-30)

    def distance(flat: Tensor, labels: Tensor | None, own: dict[str, Tensor]) -> Tensor:
        images, logits = starts.read(flat)
        gradient = measure(images, logits.softmax(dim=-1) if labels is None else labels)
        dummy, left = surviving(gradient, own, sanitizer)
        missed = ((dummy[name] - target).square().sum() for name, target in left.items())
        return sum(missed, flat.new_zeros(()))

    slope = _for_each(grad_and_value(distance))

    def evaluate(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        labels = None if starts.labels is None else starts.labels[which]
        own = {name: gradient[which] for name, gradient in observed.items()}
        gradient, loss = slope(points, labels, own)
        return loss, gradient

    problems = Problems.at(starts.flat, evaluate, history=_HISTORY, inner=_INNER)
    reached, kept = problems.loss.clone(), problems.points.clone()
    spent = torch.zeros_like(starts.victims)
    going = torch.arange(len(kept), device=device)
    for step in range(steps):
        problems.step(going)
        spent[going] += 1
        loss = problems.loss[going]
        better = (loss != reached[going]) & torch.isfinite(loss)
        going = going[better]
        reached[going], kept[going] = loss[better], problems.points[going]
        over = step + 1 == steps
        show(len(kept) - (0 if over else len(going)), float((reached / size).min()))
        if not len(going):
            break
    return kept, reached / size, spent


def _for_each(function: _Slope) -> _Slope:
    """Return ``function`` over the first dimension of its arguments.

    By vmap, or one after another for a model whose own code vmap cannot take, such as one that
    branches on a value.
    """

    def each(
        points: Tensor, labels: Tensor | None, own: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        try:
            dims = (0, None if labels is None else 0, 0)
            return vmap(function, in_dims=dims)(points, labels, own)
        except RuntimeError:
            singles = [
                function(
                    points[place],
                    None if labels is None else labels[place],
                    {name: gradient[place] for name, gradient in own.items()},
                )
                for place in range(len(points))
            ]
            gradients, losses = zip(*singles, strict=True)
            return torch.stack(gradients), torch.stack(losses)

    return each
