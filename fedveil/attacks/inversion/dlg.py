"""DLG: the published attack, a joint search for image and label."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedveil.attacks.inversion.gradients import GradientMap, check_attackable
from fedveil.attacks.inversion.observation import Inversion, Observation, Progress
from fedveil.attacks.inversion.subspace import Subspace, range_of

_INNER = 20
_HISTORY = 100


@dataclass(frozen=True, kw_only=True)
class DLG:
    """Minimise the squared distance of the gradients over dummy images and dummy labels.

    L-BFGS with learning rate 1 and a history of 100, in PyTorch's form, whose one step makes up to
    20 iterations without a line search. "100 iterations" is read as 100 such steps, as the
    published code counts. Images and label logits start from a standard normal distribution; the
    labels are probabilities by softmax. An attack stops early only where going on changes nothing:
    when a step leaves the loss as it was, or when it is no longer finite (the last finite images
    are returned).

    Source: Zhu, Liu & Han, "Deep Leakage from Gradients", NeurIPS 2019, algorithm 1 and section 4.

    Args:
        steps: Steps of L-BFGS.
        restarts: Starts for each victim; the lowest loss is kept. The paper has one.
        seed: Seeds the starts.

    Shape: any batch, float32.

    Example:
        >>> DLG(steps=100)(observation).images  # doctest: +SKIP
    """

    steps: int = 100
    restarts: int = 1
    seed: int = 0

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images and labels."""
        check_attackable(observation, attack="dlg", most=None)
        return search(
            observation,
            None,
            steps=self.steps,
            restarts=self.restarts,
            seed=self.seed,
            progress=progress,
        )


def search(
    observation: Observation,
    labels: Tensor | None,
    *,
    steps: int,
    restarts: int,
    seed: int,
    progress: Progress | None,
) -> Inversion:
    """Run the published search for every victim.

    Args:
        observation: What the attacker has.
        labels: Int64 [V, N] where they are known; None to search for them too.
        steps: Steps of L-BFGS.
        restarts: Starts for each victim.
        seed: Seeds the starts.
        progress: Called after each victim.
    """
    device = next(observation.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    measure = GradientMap.of(observation, dtype=torch.float32, device=device)
    subspace = range_of(observation.knows, observation.shape).to(torch.zeros((), device=device))
    images, found, losses, spent, seconds = [], [], [], [], []
    for victim in range(observation.victims):
        begin = time.perf_counter()
        runs = [
            _run(
                observation,
                measure,
                subspace,
                victim,
                None if labels is None else labels[victim],
                steps,
                generator,
            )
            for _ in range(restarts)
        ]
        best = min(runs, key=lambda run: run[2])
        images.append(best[0])
        found.append(best[1])
        losses.append(best[2])
        spent.append(sum(run[3] for run in runs))
        seconds.append(time.perf_counter() - begin)
        if progress:
            progress(victim + 1, observation.victims, best[2])
    return Inversion(
        images=torch.stack(images).double().cpu(),
        labels=torch.stack(found).cpu(),
        loss=torch.tensor(losses, dtype=torch.float64),
        seconds=torch.tensor(seconds),
        iterations=torch.tensor(spent),
    )


def _run(
    observation: Observation,
    measure: GradientMap,
    subspace: Subspace,
    victim: int,
    labels: Tensor | None,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float, int]:
    parameters = {k: p.clone().requires_grad_() for k, p in measure.parameters.items()}
    device = next(iter(parameters.values())).device
    observed = [observation.gradients[k][victim].to(device).float() for k in parameters]
    size = float(sum(g.square().sum() for g in observed))
    start = torch.randn(observation.images, *observation.shape, generator=generator).to(device)
    unknowns = subspace.coordinates(start).clone().requires_grad_()
    logits = torch.randn(observation.images, observation.classes, generator=generator).to(device)
    logits.requires_grad_()
    free = [unknowns, logits] if labels is None else [unknowns]
    optimiser = torch.optim.LBFGS(free, lr=1, max_iter=_INNER, history_size=_HISTORY)

    def distance() -> Tensor:
        targets = logits.softmax(dim=-1) if labels is None else labels.to(device)
        predicted = torch.func.functional_call(
            measure.model, {**parameters, **measure.constants}, (subspace.images(unknowns),)
        )
        loss = F.cross_entropy(predicted, targets)
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        pairs = zip(gradient, observed, strict=True)
        return sum(((g - o).square().sum() for g, o in pairs), loss.new_zeros(()))

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = distance()
        gradients = torch.autograd.grad(loss, free)
        for variable, gradient in zip(free, gradients, strict=True):
            variable.grad = gradient
        return loss.detach()

    loss = float(distance().detach())
    kept = (unknowns.detach().clone(), logits.detach().clone())
    step = 0
    while step < steps:
        step += 1
        optimiser.step(closure)  # type: ignore[no-untyped-call]
        reached = float(distance().detach())
        if reached == loss or not torch.isfinite(torch.tensor(reached)):
            break
        loss, kept = reached, (unknowns.detach().clone(), logits.detach().clone())
    answer = kept[1].argmax(dim=-1) if labels is None else labels
    return subspace.images(kept[0]), answer, loss / max(size, 1e-30), step
