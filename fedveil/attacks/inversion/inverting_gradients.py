"""Inverting gradients: a search along the direction of the gradient, with image priors."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedveil.attacks.inversion.gradients import (
    Factors,
    GradientMap,
    check_attackable,
    differentiable_attention,
    infer_labels,
    surviving,
    variation,
)
from fedveil.attacks.inversion.observation import (
    Inversion,
    Observation,
    Progress,
    UpdateKnowledge,
    Uses,
)
from fedveil.defenses.block_dct import BlockDCT
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.models.inspect import BATCH_NORMS

_STAGES = (3 / 8, 1 / 4, 1 / 4, 1 / 8)  # between the decays at 3/8, 5/8 and 7/8 of the steps
_DECAY = 0.1
_BETAS = (0.9, 0.999)
_TINY = 1e-12
_PATIENCE = 1 / 16  # of all steps; a stage that gained nothing for so long is over
_GAIN = 0.99
_GREY, _NOISE = 0.5, 0.25
_COEFFICIENTS = 64
_REDRAWN = 1e-4  # of the pixels' range; rounding is below, another draw of a mask above
_REPORT = 20


@dataclass(frozen=True, kw_only=True)
class InvertingGradients:
    """Minimise the angle between the gradients over images of small total variation.

    The objective is ``1 − cos(∇(x), observed) + tv·TV(x) + batch_norm·R(x)``; Adam moves along the
    sign of its derivative, its step size falls to a tenth at 3/8, 5/8 and 7/8 of the steps, and
    pixels stay in [0, 1]. R is the distance of the batch statistics of x, in each layer of batch
    normalisation, from those that came back with the weights, which of one local step are the
    batch's own; where none came back, from the running ones that were sent. All victims and
    restarts are searched at once. A known
    transformation stands inside the forward pass; where it draws at random, every step draws anew,
    so that the search is on its expectation. Weights that come back after several local steps are
    matched by simulating these, the first epoch in the order of the dummy images, the later ones in
    an order drawn anew each step, since the client's is unknown.

    The published code takes 4,800 steps of 0.1 in units of normalised pixels, about a fifth of
    ours, and weighs the variation of those with 0.1.

    Under a known transformation T the search is for x̂, and there are two questions. What was
    trained on is best answered by T(x̂), since T removes what the gradient says nothing of. The
    original is answered by x̂, in which the prior has filled in what T removes, or by T(x̂) where
    that has the smaller objective (a codec's backward pass leaves noise behind that its forward
    pass removes). Where T draws at random both are x̂: a draw of T would remove other things than
    the client's did.

    A victim is done when its angle is below ``solved``, and a stage of the step size when for 1/16
    of all steps it has brought less than a hundredth; both are seen by the attacker.

    Sources: Geiping et al., "Inverting Gradients: How easy is it to break privacy in federated
    learning?", NeurIPS 2020, section 4 and appendix A (objective, signed Adam, decay); Yin et al.,
    "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021, equation 10 (R);
    Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022, section 4 (simulation of
    local steps).

    Args:
        steps: Most steps of each restart.
        restarts: Starts for each victim; the lowest objective is kept.
        learning_rate: First step size; pixels range over 1.
        tv: Weight of the mean absolute difference of neighbouring pixels.
        keep: How many of the 64 coefficients of each 8×8 block of the discrete cosine transform are
            searched, lowest frequencies first; 64 searches all. Where a batch or noise hides more
            than a gradient tells, fewer unknowns are found better.
        batch_norm: Weight of R; 0 leaves it out.
        solved: ``1 − cos`` below which a victim is done.
        together: Victims and restarts searched at once; memory grows with it.
        dtype: float32 or float64.
        device: Where to compute; None for a GPU when there is one.
        seed: Seeds the starts.

    Shape: any batch; ReLU networks, normalised or not, in either mode.

    Raises:
        FedveilError: On a call, what ``check_attackable`` refuses, settings out of range, or a
            weight ``batch_norm`` where no layer keeps running statistics.

    Example:
        >>> InvertingGradients(steps=2400, restarts=2)(observation).images  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True, forward=True, sanitizer=True)

    steps: int = 2400
    restarts: int = 1
    learning_rate: float = 0.1
    tv: float = 0.2
    keep: int = 64
    batch_norm: float = 0.0
    solved: float = 1e-7
    together: int = 32
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "learning_rate", "together"):
            if getattr(self, name) <= 0:
                raise FedveilError(
                    f"attack ig: {name} {getattr(self, name)} is out of range; give more than 0"
                )
        for name in ("tv", "batch_norm", "solved"):
            if getattr(self, name) < 0:
                raise FedveilError(
                    f"attack ig: {name} {getattr(self, name)} is out of range; give 0 or more"
                )
        if not 1 <= self.keep <= _COEFFICIENTS:
            raise FedveilError(
                f"attack ig: keep {self.keep} is out of range; allowed: 1 to {_COEFFICIENTS}"
            )

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's images."""
        check_attackable(observation, attack="ig", most=None, local=True, batch_statistics=True)
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        objective = _Objective.of(self, observation, device)
        generator = torch.Generator().manual_seed(self.seed)
        inferred = infer_labels(observation).cpu()
        victims = observation.victims
        at_once = max(1, self.together // self.restarts)
        images, originals, labels = [], [], []
        losses, seconds, iterations = [], [], []
        for index in torch.split(torch.arange(victims), at_once):
            begin = time.perf_counter()
            part = observation.select(index)
            problems = _Problems.start(self, part, inferred[index], generator, device)
            for step in _descend(self, objective, problems, generator):
                if progress and (step % _REPORT == 0 or step == self.steps):
                    share = int(index[0]) + len(index) * step // self.steps
                    progress(share, victims, float(problems.best.max()))
            if progress:
                progress(int(index[-1]) + 1, victims, float(problems.best.max()))
            found, label, spent = problems.answers(self.restarts)
            found, before = objective.estimates(found, label, problems)
            images.append(found.double().cpu())
            originals.append(before.double().cpu())
            labels.append(label.cpu())
            losses.append(objective.map.distance(found, label, part).double().cpu())
            iterations.append(spent.cpu())
            each = (time.perf_counter() - begin) / len(index)
            seconds.append(torch.full((len(index),), each))
        return Inversion(
            images=torch.cat(images),
            originals=None if observation.knows is None else torch.cat(originals),
            labels=torch.cat(labels),
            loss=torch.cat(losses),
            seconds=torch.cat(seconds),
            iterations=torch.cat(iterations),
        )


@dataclass(frozen=True)
class _Objective:
    """What is minimised, for P problems (victims times restarts) at once."""

    map: GradientMap
    factored: tuple[str, ...]
    lower: nn.Module | None
    transform: nn.Module | None
    sanitizer: UpdateKnowledge | None
    tv: float
    batch_norm: float

    @classmethod
    def of(
        cls, attack: InvertingGradients, observation: Observation, device: torch.device
    ) -> "_Objective":
        gradients = GradientMap.of(observation, dtype=attack.dtype, device=device)
        if attack.batch_norm and not _references(observation):
            raise InapplicableAttackError(
                f"attack ig: batch_norm {attack.batch_norm} needs a model with running statistics "
                f"of batch normalisation, which {type(observation.model).__name__} has not; set it "
                "to 0"
            )
        # A copy, since moving a module to another device or precision changes it.
        transform = copy.deepcopy(observation.knows)
        lower = BlockDCT(keep=attack.keep) if attack.keep < _COEFFICIENTS else None
        # Simulated steps and sanitisers take a gradient apart entry by entry.
        whole = observation.local is not None or observation.sanitizer is not None
        generator = torch.Generator().manual_seed(attack.seed)
        tried = torch.rand(observation.images, *observation.shape, generator=generator)
        return cls(
            map=gradients,
            factored=() if whole else gradients.linear_layers(tried.to(device, attack.dtype)),
            lower=None if lower is None else lower.to(device, attack.dtype),
            transform=None if transform is None else transform.to(device, attack.dtype),
            sanitizer=observation.sanitizer,
            tv=attack.tv,
            batch_norm=attack.batch_norm,
        )

    def searched(self, images: Tensor) -> Tensor:
        """Return the images without the frequencies that are not searched, [P, N, C, H, W]."""
        return _applied(self.lower, images)

    def transformed(self, images: Tensor) -> Tensor:
        """Apply the known transformation, [P, N, C, H, W] to the same."""
        return _applied(self.transform, images)

    def __call__(
        self, images: Tensor, target: "_Target", orders: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return objective and angle (1 − cos), each [A], and the objective's derivative.

        Args:
            images: [A, N, C, H, W] of the target's problems; the derivative has their shape.
            target: What they are to match.
            orders: As ``GradientMap`` takes them.
        """
        images = images.detach().requires_grad_()
        searched = self.searched(images)
        shown = self.transformed(searched)
        dummy = self._updates(shown, target, orders)
        # The angle's derivative by the update is known, so autograd only carries it to the images.
        angle, slopes = angle_and_slopes(dummy, target.left, target.energy)
        prior = self.tv * variation(searched)
        if self.batch_norm:
            distance = vmap(self._statistics_prior)(shown, target.statistics)
            prior = prior + self.batch_norm * distance
        pairs = [(value, slopes[name]) for name, value in dummy.items()]
        followed = [
            (value, slope)
            for values, own in pairs
            for value, slope in zip(_tensors(values), _tensors(own), strict=True)
            if value.requires_grad
        ]
        slope = torch.autograd.grad(
            [*(value for value, _ in followed), prior],
            images,
            [*(slope for _, slope in followed), torch.ones_like(prior)],
        )[0]
        return angle + prior.detach(), angle, slope

    def target(self, problems: "_Problems", active: Tensor) -> "_Target":
        """Return what the problems ``active``, int64 [A], are to match."""
        return self._matching(active, problems.labels[active], problems.victims[active], problems)

    def _matching(
        self, active: Tensor, labels: Tensor, victims: Tensor, problems: "_Problems"
    ) -> "_Target":
        observed = {name: gradient[victims] for name, gradient in problems.observed.items()}
        left = vmap(lambda own: dict(surviving(own, own, self.sanitizer)[1]))(observed)
        kept = {
            name: (mean[victims], variance[victims])
            for name, (mean, variance) in problems.statistics.items()
        }
        return _Target(active, labels, observed, left, energy(left), kept)

    def estimates(
        self, images: Tensor, labels: Tensor, problems: "_Problems"
    ) -> tuple[Tensor, Tensor]:
        """Return what was trained on and what it was before, each victim's, [V, N, C, H, W].

        Args:
            images: [V, N, C, H, W], as the search found them.
            labels: Int64 [V, N], of that search.
            problems: The search.
        """
        with torch.no_grad():
            images = self.searched(images)
            shown, again = self.transformed(images), self.transformed(images)
        if self.transform is None or not torch.allclose(shown, again, atol=_REDRAWN):
            return images, images
        every = torch.arange(len(images), device=images.device)
        target = self._matching(every, labels, every, problems)
        with differentiable_attention():
            kept, moved = (self(candidate, target, [])[0] for candidate in (images, shown))
        smaller = (moved < kept).reshape(-1, 1, 1, 1, 1)
        return shown, torch.where(smaller, shown, images)

    def _updates(
        self, images: Tensor, target: "_Target", orders: list[Tensor]
    ) -> Mapping[str, Tensor | Factors]:
        if self.factored:
            return vmap(lambda own, labels: self.map.factored(own, labels, self.factored))(
                images, target.labels
            )

        def left(images: Tensor, labels: Tensor, observed: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(surviving(self.map(images, labels, orders), observed, self.sanitizer)[0])

        return vmap(left)(images, target.labels, target.observed)

    def _statistics_prior(self, images: Tensor, kept: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        distances: list[Tensor] = []

        def compare(name: str, given: Tensor) -> None:
            axes = [0, *range(2, given.ndim)]
            # What is kept of a batch's variance is unbiased.
            variance, mean = torch.var_mean(given, dim=axes, correction=1)
            for own, reference in zip((mean, variance), kept[name], strict=True):
                distances.append((own - reference).square().sum().clamp_min(_TINY).sqrt())

        hooks = [
            self.map.model.get_submodule(name).register_forward_pre_hook(
                lambda _module, inputs, name=name: compare(name, inputs[0])
            )
            for name in kept
        ]
        try:
            state = {**self.map.parameters, **self.map.constants}
            functional_call(self.map.model, state, (images,))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(distances).sum()


def _references(observation: Observation) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and unbiased variance to be matched in each layer, [V, C] each.

    What came back of it; of a layer that nothing came back of what was sent.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in observation.model.named_modules():
        if name in observation.statistics:
            told = observation.statistics[name]
            found[name] = told.mean, told.variance
        elif isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            mean, variance = module.running_mean, module.running_var
            assert isinstance(mean, Tensor)
            assert isinstance(variance, Tensor)
            every = (observation.victims, -1)
            found[name] = mean.expand(every), variance.expand(every)
    return found


def _applied(module: nn.Module | None, images: Tensor) -> Tensor:
    if module is None:
        return images
    moved: Tensor = module(images.flatten(0, 1))
    return moved.reshape(images.shape)


@dataclass(frozen=True)
class _Target:
    """What A active problems are to match.

    Attributes:
        active: Int64 [A], which problems these are.
        labels: Int64 [A, N].
        observed: Parameter name to [A, *shape].
        left: The same without what a known sanitiser destroyed.
        energy: [A], the squared length of that.
        statistics: Mean and variance, [A, C] each, of what layers of batch normalisation are given.
    """

    active: Tensor
    labels: Tensor
    observed: dict[str, Tensor]
    left: dict[str, Tensor]
    energy: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]]


@dataclass
class _Problems:
    """P problems on their way: a victim's restarts lie next to each other.

    Attributes:
        images: [P, N, C, H, W], as they are now.
        labels: Int64 [P, N].
        victims: Int64 [P], whose gradient each one matches.
        observed: Parameter name to [V, *shape].
        statistics: Mean and variance, [V, C] each, of what layers of batch normalisation are given.
        found: [P, N, C, H, W], where the objective was lowest.
        best: [P], that lowest objective.
        angle: [P], 1 − cos there.
        spent: Int64 [P], steps taken.
    """

    images: Tensor
    labels: Tensor
    victims: Tensor
    observed: dict[str, Tensor]
    statistics: dict[str, tuple[Tensor, Tensor]]
    found: Tensor = field(init=False)
    best: Tensor = field(init=False)
    angle: Tensor = field(init=False)
    spent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.images)
        self.found = self.images.clone()
        self.best = self.images.new_full((count,), torch.inf)
        self.angle = self.images.new_full((count,), torch.inf)
        self.spent = torch.zeros(count, dtype=torch.int64, device=self.images.device)

    @classmethod
    def start(
        cls,
        attack: InvertingGradients,
        observation: Observation,
        labels: Tensor,
        generator: torch.Generator,
        device: torch.device,
    ) -> "_Problems":
        repeats, batch = attack.restarts, observation.images
        count = observation.victims * repeats
        noise = torch.randn(count, batch, *observation.shape, generator=generator)
        labels = labels.repeat_interleave(repeats, dim=0)
        if observation.local is not None:
            # Which label belongs to which step is unknown, so every restart guesses anew.
            guesses = torch.stack([torch.randperm(batch, generator=generator) for _ in labels])
            labels = labels.gather(1, guesses)
        return cls(
            images=(noise * _NOISE + _GREY).clamp(0, 1).to(device, attack.dtype),
            labels=labels.to(device),
            victims=torch.arange(observation.victims, device=device).repeat_interleave(repeats),
            observed={
                name: gradient.detach().to(device, attack.dtype)
                for name, gradient in observation.gradients.items()
            },
            statistics={
                name: (mean.to(device, attack.dtype), variance.to(device, attack.dtype))
                for name, (mean, variance) in _references(observation).items()
            }
            if attack.batch_norm
            else {},
        )

    def note(self, active: Tensor, total: Tensor, angle: Tensor) -> None:
        """Keep what is better than before."""
        better = total < self.best[active]
        where = active[better]
        self.found[where] = self.images[where]
        self.best[where] = total[better]
        self.angle[where] = angle[better]

    def move(self, active: Tensor, images: Tensor) -> None:
        """Place the active problems at ``images``."""
        self.images[active] = images
        self.spent[active] += 1

    def unsolved(self, solved: float) -> Tensor:
        """Return which problems go on: those of victims that no restart has solved; int64 [A]."""
        done = torch.zeros(int(self.victims.max()) + 1, device=self.angle.device)
        done.index_add_(0, self.victims, (self.angle < solved).to(done))
        return torch.nonzero(done[self.victims] == 0)[:, 0]

    def answers(self, restarts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best restart of each victim: images, labels, and steps of all restarts."""
        chosen = self.best.reshape(-1, restarts).argmin(dim=1)
        chosen = chosen + torch.arange(len(chosen), device=chosen.device) * restarts
        return self.found[chosen], self.labels[chosen], self.spent.reshape(-1, restarts).sum(dim=1)


def _descend(
    attack: InvertingGradients,
    objective: _Objective,
    problems: _Problems,
    generator: torch.Generator,
) -> Iterator[int]:
    """Search until every victim is solved or the steps are spent; yield the steps gone."""
    first = torch.zeros_like(problems.images)
    second = torch.zeros_like(problems.images)
    device = problems.images.device
    patience = max(10, round(attack.steps * _PATIENCE))
    taken = 0
    target: _Target | None = None
    for stage, share in enumerate(_STAGES):
        rate = attack.learning_rate * _DECAY**stage
        reference, since = torch.inf, 0
        for _ in range(round(share * attack.steps)):
            active = problems.unsolved(attack.solved)
            if not len(active) or since >= patience:
                break
            if target is None or len(active) < len(target.active):
                target = objective.target(problems, active)
            images = problems.images[active]
            with differentiable_attention():
                orders = _orders(objective.map, problems, generator, device)
                total, angle, slope = objective(images, target, orders)
            slope = slope.sign().nan_to_num()
            problems.note(active, total, angle)
            taken += 1
            first[active] = _BETAS[0] * first[active] + (1 - _BETAS[0]) * slope
            second[active] = _BETAS[1] * second[active] + (1 - _BETAS[1]) * slope.square()
            move = first[active] / (1 - _BETAS[0] ** taken)
            scale = (second[active] / (1 - _BETAS[1] ** taken)).sqrt() + 1e-8
            problems.move(active, (images - rate * move / scale).clamp(0, 1))
            mean = float(problems.best[active].mean())
            reference, since = (mean, 0) if mean < _GAIN * reference else (reference, since + 1)
            yield taken


def _orders(
    gradients: GradientMap, problems: _Problems, generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    if gradients.local is None:
        return []
    batch = problems.labels.shape[1]
    return [
        torch.randperm(batch, generator=generator).to(device)
        for _ in range(gradients.local.epochs - 1)
    ]


def angle_and_slopes(
    dummy: Mapping[str, Tensor | Factors], observed: Mapping[str, Tensor], energy: Tensor
) -> tuple[Tensor, dict[str, Tensor | Factors]]:
    """Return ``1 − cos`` of the angle between updates, and its derivative by the first.

    In closed form: three passes over the updates where autograd makes a dozen, and updates of many
    victims fit in no cache. Of a weight whose gradient comes as factors the gradient itself is
    never there.

    Args:
        dummy: Parameter name to [A, *shape], or to the factors of that.
        observed: The same names, each to [A, *shape].
        energy: [A], the squared lengths of what was observed.

    Returns:
        [A], and for each name the derivative by what was given; no gradient flows through either.
    """
    with torch.no_grad():
        inner = _inner(dummy, observed)
        size = torch.stack([_square(value) for value in dummy.values()]).sum(dim=0)
        size = size.clamp_min(_TINY**2)
        share = 1 / (size * energy.clamp_min(_TINY**2)).sqrt()
        cosine = inner * share
        slopes = {
            name: _slope(value, observed[name], cosine / size, share)
            for name, value in dummy.items()
        }
    return 1 - cosine, slopes


def energy(updates: Mapping[str, Tensor]) -> Tensor:
    """Return the squared lengths, [A], of updates: parameter name to [A, *shape]."""
    return _inner(updates, updates)


def _inner(a: Mapping[str, Tensor | Factors], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner products, [A], by matrix products, which store no products of entries."""
    return torch.stack([_product(a[name], b[name]) for name in a]).sum(dim=0)


def _product(a: Tensor | Factors, b: Tensor) -> Tensor:
    if isinstance(a, Factors):
        return (a.slopes * torch.bmm(a.inputs, b.mT)).flatten(1).sum(dim=1)
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).flatten()


def _square(a: Tensor | Factors) -> Tensor:
    if isinstance(a, Factors):
        inputs, slopes = torch.bmm(a.inputs, a.inputs.mT), torch.bmm(a.slopes, a.slopes.mT)
        return (inputs * slopes).flatten(1).sum(dim=1)
    return _product(a, a)


def _slope(
    value: Tensor | Factors, observed: Tensor, kept: Tensor, share: Tensor
) -> Tensor | Factors:
    """Return ``kept · g − share · observed``, or that by the factors of the gradient g."""
    wide = (-1, *[1] * (observed.ndim - 1))
    kept, share = kept.reshape(wide), share.reshape(wide)
    if isinstance(value, Factors):
        inputs, slopes = value
        among_inputs, among_slopes = torch.bmm(inputs, inputs.mT), torch.bmm(slopes, slopes.mT)
        return Factors(
            kept * torch.bmm(among_slopes, inputs) - share * torch.bmm(slopes, observed),
            kept * torch.bmm(among_inputs, slopes) - share * torch.bmm(inputs, observed.mT),
        )
    return (value * kept).addcmul_(observed, share, value=-1)


def _tensors(value: Tensor | Factors) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, Factors) else (value,)
