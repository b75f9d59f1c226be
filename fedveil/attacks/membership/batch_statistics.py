"""Membership by the statistics of batch normalisation that a client sends back with its weights."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.observation import Observation, Uses
from fedveil.attacks.inversion.running_statistics import read_running_statistics
from fedveil.attacks.membership.per_image import settled, train_as_client
from fedveil.data.images import Images
from fedveil.errors import InapplicableAttackError

_AT_ONCE = 128
_DEAD = 1e-6  # of the largest deviation; a channel below it tells images apart by rounding
_TINY = 1e-12
_ROUNDED = 0.01  # images


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Score candidate images by what running statistics tell of the batch they were in.

    The change of a layer's running statistics gives away the mean and the variance, over images
    and positions, of what the layer was given. Both are means over the images of numbers that each
    image has by itself: of its channels' means, and of their mean squared distances from the
    batch's mean. What precedes a layer normalises by the batch's own statistics, which came back,
    too, so that in one local step a candidate's numbers are what they were in its batch, in every
    layer. A mean z̄ of N such vectors tells of each whether it was in it: of vectors whitened by
    the covariance of public images' the likelihood ratio of a candidate c is, up to constants,
    −‖z̄ − c/N‖².

    After several steps means and variances are those of all batches together, the last ones
    weighing most, of features that move as the weights do. Candidates are then seen by the weights
    halfway between those that were sent and those that came back; what shadows find, which train on
    public images as the client did on its own, is subtracted; and a layer whose numbers are further
    off than a mean of N vectors can be counts for as much less.

    Sources: Sankararaman et al., "Genomic privacy and limits of individual detection in a pool",
    Nature Genetics 2009 (the likelihood ratio of a pool's mean); Dwork et al., "Robust Traceability
    from Trace Amounts", FOCS 2015 (how many means tell of how many members). That running
    statistics are such a mean, and their use in the client's own mode, are ours.

    Args:
        ridge: Weight of the identity against the public images' correlations, in (0, 1].
        public: Most public images to whiten by.
        shadows: Models that are trained on public images to tell how features move.
        seed: Seeds the shadows.
        device: Where to compute; None for a GPU when there is one.

    Shape: any batch, sum and local training, under any change of the update that leaves the
    statistics as they are; a model with layers of batch normalisation.

    Example:
        >>> BatchStatistics()(observation, candidates, public)  # doctest: +SKIP
    """

    uses: ClassVar = Uses()

    ridge: float = 0.1
    public: int = 512
    shadows: int = 4
    seed: int = 0
    device: torch.device | None = None

    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float64 [V, M]; larger speaks for having been used.

        Args:
            observation: Updates of V victims; what is known of a defence is not used.
            candidates: M images, as a client would have trained on them; labels are not used.
            public: Images that nobody trained on, treated in the same way.

        Raises:
            InapplicableAttackError: No running statistics came back.
        """
        if not observation.statistics:
            raise InapplicableAttackError(
                "no running statistics of batch normalisation came back with the update; use "
                "another attack"
            )
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        known = public[: self.public]
        model = copy.deepcopy(observation.model).to(device)
        quiet, expected = settled(model, known), self._expected(model, observation, known)
        scores = []
        for victim in range(observation.victims):
            layers = _Layers.of(quiet, observation, victim)
            pool = _Pool.of(layers, known, expected, self.ridge)
            scores.append(pool.ratio(layers.vectors(candidates)))
        return torch.stack(scores)

    def _expected(
        self, model: nn.Module, observation: Observation, public: Images
    ) -> "_Statistics | None":
        """Return what several steps on public images lead to expect; None where nothing is told."""
        local, generator = observation.local, torch.Generator().manual_seed(self.seed)
        if local is None or not len(public):
            return None
        own, sent = observation.images // observation.clients, model.state_dict()
        states = []
        for _ in range(self.shadows):
            shadow = copy.deepcopy(model)
            drawn = torch.randperm(len(public), generator=generator)[:own]
            if own > len(public):
                drawn = torch.randint(len(public), (own,), generator=generator)
            train_as_client(shadow, public[drawn], local, generator)
            if all(bool(value.isfinite().all()) for value in shadow.state_dict().values()):
                states.append(shadow.state_dict())
        found = read_running_statistics(model, sent, states, steps=local.steps(own)).layers
        if not observation.statistics.keys() <= found.keys():
            return None
        return {
            name: (found[name].mean.mean(dim=0), found[name].variance.mean(dim=0))
            for name in observation.statistics
        }


_Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and unbiased variance, float64 [C] each, by the name of a layer."""


@dataclass(frozen=True)
class _Layers:
    """The client's model in the mode it trained in, as one victim's batch set its normalisation.

    Attributes:
        model: Normalises by the batch's statistics, image by image.
        seen: What came back, of the layers that see each image once.
        values: Numbers of a channel in a batch, by the name of the layer.
        batch: Images of a batch.
        pooled: Images behind the statistics, as many as weigh alike.
    """

    model: nn.Module
    seen: _Statistics
    values: Mapping[str, float]
    batch: float
    pooled: float

    @classmethod
    def of(cls, model: nn.Module, observation: Observation, victim: int) -> "_Layers":
        """Return them, with the weights halfway along the client's path.

        Args:
            model: Whose batch normalisation goes by public images.
            observation: With the victim's statistics.
            victim: Which one.
        """
        model, local = copy.deepcopy(model), observation.local
        model.load_state_dict(observation.returned(victim, share=0.5), strict=False)
        device = next(model.parameters()).device
        own = observation.images / observation.clients
        batch = own if local is None else min(own, local.batch_size)
        seen, values, alike = {}, {}, 1.0
        blank = torch.zeros(2, *observation.shape, device=device)
        for name, places in _used_once(model, list(observation.statistics), blank).items():
            found = observation.statistics[name]
            values[name] = batch * places
            variance = found.variance[victim].to(device)
            seen[name] = found.mean[victim].to(device), variance
            layer: Any = model.get_submodule(name)
            layer.running_mean = seen[name][0].to(layer.running_mean)
            layer.running_var = _biased(variance, values[name]).to(layer.running_var)
            alike = 1 / float(found.batches[victim] * found.concentration[victim])
        epochs = 1 if local is None else local.epochs
        pooled = max(1.0, observation.images * min(1.0, alike * epochs))
        return cls(model, seen, values, batch, pooled)

    def vectors(self, images: Images) -> Tensor:
        """Return of each image its means and mean squares, less the victim's means, [N, 2·ΣC].

        In float64, layer after layer.
        """
        device, rows = next(self.model.parameters()).device, []
        given: dict[str, Tensor] = {}

        def note(name: str, values: Tensor) -> None:
            values = values.flatten(2) if values.ndim > 2 else values[..., None]
            apart = values - self.seen[name][0].to(values)[:, None]
            each = apart.flatten(0, 1)
            squares = torch.bmm(each[:, None], each[..., None]).reshape(apart.shape[:2])
            found = torch.cat([apart.mean(dim=2), squares / apart.shape[2]], dim=1)
            given[name] = found.double()

        with torch.no_grad(), _hooked(self.model, list(self.seen), note):
            for start in range(0, len(images), _AT_ONCE):
                self.model(images[start : start + _AT_ONCE].pixels.to(device))
                rows.append(torch.cat([given[name] for name in self.seen], dim=1))
        return torch.cat(rows)

    def told(self, statistics: _Statistics) -> Tensor:
        """Return the mean of such vectors that statistics tell, [2·ΣC]."""
        parts = []
        for name, (middle, _) in self.seen.items():
            mean, variance = statistics[name]
            apart = mean.to(middle) - middle
            within = _biased(variance.to(middle), self.values[name])
            parts += [apart, within + apart.square()]
        return torch.cat(parts)

    def parts(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what a vector [2·ΣC] holds of each layer's means, and of its mean squares."""
        sizes = [len(mean) for mean, _ in self.seen.values() for _ in range(2)]
        own = torch.split(vector, sizes)
        return list(zip(own[::2], own[1::2], strict=True))


@dataclass(frozen=True)
class _Pool:
    """The mean of what images gave the layers, beside the public images'.

    Attributes:
        middle: Float64 [D], of the public images.
        scale: Float64 [D], one over their standard deviations; 0 where they have none.
        mean: Float64 [D], z̄, standardised.
        images: N.
        diagonal: Float64 [D], of z̄'s covariance given one candidate; the rest is of low rank.
        rows: Float64 [P, D], of which that rest is rowsᵀ·rows.
        inverse: Float64 [P, P], of 1 + rows·diagonal⁻¹·rowsᵀ.
    """

    middle: Tensor
    scale: Tensor
    mean: Tensor
    images: float
    diagonal: Tensor
    rows: Tensor
    inverse: Tensor

    @classmethod
    def of(
        cls, layers: _Layers, public: Images, expected: _Statistics | None, ridge: float
    ) -> "_Pool":
        known, count = layers.vectors(public), layers.pooled
        middle, deviation = known.mean(dim=0), known.std(dim=0)
        alive = deviation > _DEAD * deviation.max()
        scale = torch.where(alive, 1 / deviation.clamp_min(_TINY), 0.0)
        seen, moved = layers.told(layers.seen), torch.zeros_like(middle)
        if expected is None:
            mean = (seen + _between(layers, deviation.square()) - middle) * scale
        else:
            mean = (seen - layers.told(expected)) * scale
            moved = _excess(layers, mean)
        # Of the other N − 1 images; what is left of one alone is rounding.
        others = (count - 1 + _ROUNDED) / count**2
        rows = (known - middle) * scale * (others * (1 - ridge) / len(known)) ** 0.5
        diagonal = others * ridge + moved
        gram = (rows / diagonal) @ rows.T
        gram.diagonal().add_(1)
        return cls(middle, scale, mean, count, diagonal, rows, torch.linalg.inv(gram))

    def ratio(self, vectors: Tensor) -> Tensor:
        """Return twice the logarithm of each candidate's likelihood ratio, float64 [M].

        Up to what no candidate changes.
        """
        missed = self.mean - (vectors - self.middle) * self.scale / self.images
        alone = missed / self.diagonal
        common = alone @ self.rows.T
        explained = ((common @ self.inverse) * common).sum(dim=1)
        return (explained - (missed * alone).sum(dim=1)).cpu()


def _biased(variance: Tensor, values: float) -> Tensor:
    return variance * max(values - 1, 0) / max(values, 1)


def _between(layers: _Layers, variance: Tensor) -> Tensor:
    """Return by how much variances within batches fall short of those of all images, [2·ΣC]."""
    apart = variance * (1 / layers.batch - 1 / layers.pooled)
    pairs = ((torch.zeros_like(means), means) for means, _ in layers.parts(apart))
    return torch.cat([one for pair in pairs for one in pair])


def _excess(layers: _Layers, mean: Tensor) -> Tensor:
    """Return by how much the squares of z̄ exceed 1/N, on the mean over a layer, [2·ΣC]."""
    halves = (half for pair in layers.parts(mean.square()) for half in pair)
    return torch.cat(
        [(half.mean() - 1 / layers.pooled).clamp_min(0).expand(len(half)) for half in halves]
    )


def _used_once(model: nn.Module, names: list[str], images: Tensor) -> dict[str, int]:
    """Return the layers that see each image once, in the order of use, and at how many positions.

    What a layer that is used several times was given is one mean over all its uses.
    """
    seen: dict[str, list[int]] = {}

    def note(name: str, given: Tensor) -> None:
        seen.setdefault(name, []).append(given[0, 0].numel())

    with torch.no_grad(), _hooked(model, names, note):
        model(images)
    return {name: places[0] for name, places in seen.items() if len(places) == 1}


@contextmanager
def _hooked(
    model: nn.Module, names: list[str], note: Callable[[str, Tensor], None]
) -> Iterator[None]:
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, inputs, name=name: note(name, inputs[0])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
