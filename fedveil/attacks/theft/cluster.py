"""Clusters of the copy's features, named by what the noisy heads of all copies vote."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.attacks.theft.holdout import Score, predict, score_folds
from fedveil.attacks.theft.observation import Stolen, TheftObservation, distinct
from fedveil.attacks.theft.probe import head_of, regress

_RIDGE = 1e-2
_TINY = 1e-9
_PER_CLASS = 4  # fewest images a class that can be clustered


@dataclass(frozen=True)
class Cluster:
    """Fit a new output layer to labels that nobody gave: 0 labels and up.

    Where a protection degrades the output layer alone, the features beneath it are clean, and
    images of a class lie together there. They are clustered; each copy's answers are standardised
    class by class over the images, so that no noise in a bias or a scale counts, and added up, so
    that independent noise averages out; clusters get the names of classes by the assignment that
    suits these votes best; the output layer is regressed on the names. Labelled images, where there
    are some, vote for their cluster's name and count in the regression as what they are.

    Which clustering counts is decided on the holdout; without labels by how many images the votes
    and the names agree on, which the thief sees.

    Sources: ours; clusters as classes after Caron et al., "Deep Clustering for Unsupervised
    Learning of Visual Features", ECCV 2018; the assignment is Kuhn's, "The Hungarian Method", 1955.

    Args:
        dimensions: Principal components of the features that are clustered, each tried both as they
            are and whitened; in the number of classes less one.
        starts: Starts of k-means, of which the tightest counts.
        weight: Of the labelled images among all, in the regression.
    """

    dimensions: tuple[int, ...] = (1, 2)
    starts: int = 20
    weight: float = 1.0

    def applies(self, observation: TheftObservation) -> bool:
        """Return whether the model ends in one linear layer and there are images to cluster."""
        layer = head_of(observation)
        if layer is None:
            return False
        images = len(observation.labelled) + len(observation.unlabelled)
        return images >= _PER_CLASS * _outputs(observation, layer)

    def __call__(self, observation: TheftObservation) -> Stolen:
        """Return the last copy with a new output layer."""
        layer = head_of(observation)
        assert layer is not None
        seen = _Seen.of(observation, layer)
        clusterings = list(self._clusterings(seen))
        everything = torch.arange(len(observation.labelled))
        best, groups = max(
            ((self._checked(observation, seen, groups), groups) for groups in clusterings),
            key=lambda found: found[0],
        )
        weight, bias = self._head(seen, _named(seen, groups, everything), everything)
        head = {f"{layer}.weight": weight, f"{layer}.bias": bias}
        return Stolen({**observation.start, **head}, best)

    def _clusterings(self, seen: "_Seen") -> Iterator[Tensor]:
        from sklearn.cluster import KMeans

        middled = (seen.features - seen.features.mean(0)).double()
        _, values, rows = torch.linalg.svd(middled, full_matrices=False)
        for times in self.dimensions:
            kept = min(times * (seen.classes - 1), int((values > _TINY * values[0]).sum()))
            parts = middled @ rows[:kept].T
            for points in (parts, parts / parts.std(0).clamp_min(_TINY)):
                means = KMeans(seen.classes, n_init=self.starts, random_state=seen.seed)
                yield torch.from_numpy(means.fit_predict(points.numpy())).long()

    def _checked(self, observation: TheftObservation, seen: "_Seen", groups: Tensor) -> Score:
        if not observation.has_labels:
            named = _named(seen, groups, torch.empty(0, dtype=torch.int64))
            return Score(0.0, float((seen.votes.argmax(1) == named).double().mean()))
        logits = []
        for fold in observation.folds:
            weight, bias = self._head(seen, _named(seen, groups, fold.train), fold.train)
            logits.append(seen.features[fold.held_out] @ weight.T + bias)
        return score_folds(observation.folds, observation.labelled.labels, logits)

    def _head(self, seen: "_Seen", named: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Regress on names, labelled images standing for as many as all others times the weight."""
        answers = F.one_hot(named, seen.classes).double()
        features = seen.features
        if len(known):
            answers[known] = F.one_hot(seen.labels[known], seen.classes).double()
            times = int(self.weight * len(features)) // len(known)
            features = torch.cat([features, features[known].repeat(times, 1)])
            answers = torch.cat([answers, answers[known].repeat(times, 1)])
        return regress(features[:, None], answers, _RIDGE)


@dataclass(frozen=True)
class _Seen:
    """What the thief has of its images, the labelled ones first.

    Attributes:
        features: Float [M, D], what the last copy's output layer is given.
        votes: Float64 [M, classes], standardised answers of all distinct copies, averaged.
        labels: Int64 [n], of the first n images.
        classes: How many there are.
        seed: The thief's.
    """

    features: Tensor
    votes: Tensor
    labels: Tensor
    classes: int
    seed: int

    @classmethod
    def of(cls, observation: TheftObservation, layer: str) -> "_Seen":
        pixels = torch.cat([observation.labelled.pixels, observation.unlabelled])
        body = observation.model(observation.start)
        # The logits of a model that hands its features through are the features.
        body.set_submodule(layer, nn.Identity())
        copies = distinct([copy.weights for copy in observation.copies]) or [{}]
        fresh = observation.architecture.state_dict()
        votes: Tensor = torch.stack(
            [
                _standardised(predict(observation.model({**fresh, **copy}), pixels))
                for copy in copies
            ]
        ).mean(0)
        return cls(
            predict(body, pixels),
            votes,
            observation.labelled.labels,
            _outputs(observation, layer),
            observation.seed,
        )


def _standardised(logits: Tensor) -> Tensor:
    given = logits.double().nan_to_num()
    return (given - given.mean(0)) / given.std(0).clamp_min(_TINY)


def _named(seen: _Seen, groups: Tensor, known: Tensor) -> Tensor:
    """Return each image's class, int64 [M], from its cluster's votes and those of known labels."""
    from scipy.optimize import linear_sum_assignment

    said = torch.zeros(seen.classes, seen.classes, dtype=torch.float64)
    said.index_add_(0, groups, seen.votes)
    said /= torch.bincount(groups, minlength=seen.classes).clamp_min(1)[:, None]
    for place in known.tolist():
        said[groups[place], seen.labels[place]] += 1
    clusters, names = linear_sum_assignment(said.numpy(), maximize=True)
    lookup = torch.empty(seen.classes, dtype=torch.int64)
    lookup[torch.from_numpy(clusters)] = torch.from_numpy(names)
    return lookup[groups]


def _outputs(observation: TheftObservation, layer: str) -> int:
    module = observation.architecture.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    return module.out_features
