"""How many images behind an update a server picks out among candidates, rebuilding none."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership import ATTACKS, ManyRounds, Span
from fedveil.audit.adaptive import Attacker, attackers
from fedveil.audit.metrics import CANDIDATES, ROC_HEAD, Ranks, over_updates, recognised
from fedveil.audit.scoring import strangers_to
from fedveil.data import Dataset, Images
from fedveil.defenses import Defense
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.results import CERTAIN, PICKED_OUT
from fedveil.wording import quantity

_STRANGERS = 1_000  # a rate of one in a thousand needs as many
_UNSEEN = 250
_PUBLIC = 512


@dataclass(frozen=True)
class Recognition:
    """How well one attack tells the images that were used from others.

    Attributes:
        attack: Its name.
        adaptive: Whether the attacker knows the defence.
        picked: Float64 [V, N], the probability that each image of each update scores above 99
            strangers.
        strangers: Against training images of other clients or rounds, which no model knows worse
            than those that were used.
        unseen: Against test images that no model was ever trained on; None where there are none
            beside those that the attacker learns from.
        certain: Share of images that the attack calls used beyond doubt; None if it never says so.
        mistaken: How many strangers it called so.
    """

    attack: str
    adaptive: bool
    picked: Tensor
    strangers: Ranks
    unseen: Ranks | None
    certain: float | None = None
    mistaken: int = 0

    @property
    def chance(self) -> float:
        """The share that scores without content pick out."""
        return 1 / (min(CANDIDATES - 1, self.strangers.strangers) + 1)

    def as_json(self) -> dict[str, Any]:
        """Return a row of ``membership`` in ``leakage.json``."""
        picked = over_updates(self.picked)
        return {
            "attack": self.attack,
            "adaptive": self.adaptive,
            "updates": len(self.picked),
            "images": self.picked.numel(),
            PICKED_OUT.key: picked.value,
            f"{PICKED_OUT.key}_low": picked.low,
            f"{PICKED_OUT.key}_high": picked.high,
            f"{PICKED_OUT.key}_floor": self.chance,
            "strangers": _points(self.strangers),
            "unseen": None if self.unseen is None else _points(self.unseen),
            CERTAIN.key: self.certain,
            "mistaken": self.mistaken,
        }


def table(found: Mapping[str, Sequence[Recognition]]) -> list[str]:
    """Return lines of text: what each attack tells under each defence, against strangers.

    Where who knows the defence tells what who does not tells, the two are one line.
    """
    told = {defense: rows for defense, rows in found.items() if rows}
    return [*_lines(told), *untold(found)]


def _lines(found: Mapping[str, Sequence[Recognition]]) -> list[str]:
    if not found:
        return []
    wide = max(16, *(len(defense) + 2 for defense in found))
    narrow = max(12, *(len(row.attack) + 2 for rows in found.values() for row in rows))
    lines = [
        f"{'membership':{narrow}}{'defence':{wide}}{'attacker':10}{CERTAIN.heading:>9}  {ROC_HEAD}"
    ]
    for defense, rows in found.items():
        told: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            sure = "-" if row.certain is None else f"{row.certain:.0%}"
            figures = f"{sure:>9}  {row.strangers.roc().as_text()}"
            kinds = told.setdefault((row.attack, figures), [])
            kinds.append("adaptive" if row.adaptive else "naive")
        lines += [
            f"{attack:{narrow}}{defense:{wide}}{'either' if len(kinds) > 1 else kinds[0]:10}"
            f"{figures}"
            for (attack, figures), kinds in told.items()
        ]
    return lines


def untold(found: Mapping[str, Sequence[Recognition]]) -> tuple[str, ...]:
    """Return in a sentence under which defences nothing is told, if under any."""
    nobody = [defense for defense, rows in found.items() if not rows]
    return (_untold(nobody),) if nobody else ()


def unread(observation: Observation) -> tuple[str, ...]:
    """Return in a sentence of which layers' statistics an update tells nothing, if of any.

    An app that returns its whole state sends them, so their absence here clears no other.
    """
    if not observation.unread:
        return ()
    layer, why = next(iter(observation.unread.items()))
    count = len(observation.unread)
    others = f" and {quantity(count - 1, 'other layer')}" if count > 1 else ""
    return (
        f"What running statistics of batch normalisation tell was not told of {layer}{others} "
        f"({why}): a client that returns its whole state gives them away",
    )


def _untold(defenses: Sequence[str]) -> str:
    return (
        f"Which images were used was not told under {', '.join(defenses)}: every training image "
        "was, or is a double of one, so that there is none to tell them from"
    )


def _points(ranks: Ranks) -> dict[str, Any]:
    return {"strangers": ranks.strangers, **ranks.roc().as_json()}


def joined(parts: Sequence[tuple[Recognition, ...]]) -> tuple[Recognition, ...]:
    """Return what attacks tell of several observations, of as many images an update, as of one."""
    groups: dict[tuple[str, bool], list[Recognition]] = {}
    for one in itertools.chain(*parts):
        groups.setdefault((one.attack, one.adaptive), []).append(one)
    return tuple(_joined_up(group) for group in groups.values())


def _joined_up(parts: Sequence[Recognition]) -> Recognition:
    unseen = [part.unseen for part in parts if part.unseen is not None]
    certain = [part.certain for part in parts if part.certain is not None]
    weights = [len(part.picked) for part in parts if part.certain is not None]
    return replace(
        parts[0],
        picked=torch.cat([part.picked for part in parts]),
        strangers=Ranks.joined([part.strangers for part in parts]),
        unseen=Ranks.joined(unseen) if len(unseen) == len(parts) else None,
        certain=statistics.fmean(certain, weights) if certain else None,
        mistaken=sum(part.mistaken for part in parts),
    )


def best(found: Sequence[Recognition], *, adaptive: bool) -> Recognition | None:
    """Return the attack that picks out most, of those by an attacker who knows the defence or not.

    A defence is scored by the best attack of the suite, so the choice is made on what is reported.
    """
    own = [one for one in found if one.adaptive == adaptive]
    return max(own, key=lambda one: float(one.picked.mean()), default=None)


def picked_out(
    defense: Defense,
    informed: Observation,
    data: Dataset,
    used: Tensor,
    *,
    seed: int,
    scored: int | None = None,
    attacks: Sequence[str] = tuple(ATTACKS),
    naive: bool = True,
) -> tuple[Recognition, ...]:
    """Run every membership attack on an observation and score it.

    The strangers are training images like those that were used, in other clients' shares or in
    other rounds'.

    Args:
        defense: What the clients do.
        informed: The observation, with all public knowledge.
        data: What is learnt; its first test images are the attacker's own.
        used: Int64 [M], which training images are behind the updates, one victim after the other.
        seed: Seeds the choice of the others, and of those that are scored.
        scored: How many images of each victim are scored, drawn at random; None for all.
        attacks: Names of those that run.
        naive: Whether they also run as who does not know the defence.

    Returns:
        One for each attack and kind of attacker; none where every training image was used. An
        attack that the model gives nothing to work on is left out.
    """
    lineup = _Lineup.of(data, used.reshape(informed.victims, -1), seed, scored)
    if lineup is None:
        return ()
    return _by_all(
        defense,
        lineup,
        lambda name, aware, seen: _run(name, _attacker(defense, informed, name, aware=aware), seen),
        attacks,
        naive=naive,
    )


def picked_out_over_rounds(
    defense: Defense,
    rounds: Sequence[Observation],
    data: Dataset,
    used: Tensor,
    *,
    seed: int,
) -> tuple[Recognition, ...]:
    """Run every membership attack on many rounds of one client, put together, and score it.

    Args:
        defense: What the clients do.
        rounds: With all public knowledge; in each the client's update first, then others'.
        data: As of ``picked_out``.
        used: Int64 [N], which training images are behind the client's update of every round.
        seed: As of ``picked_out``.

    Returns:
        As of ``picked_out``; an attack's name is followed by the number of rounds.
    """
    lineup = _Lineup.of(data, used[None], seed, None)
    if lineup is None:
        return ()

    def run(name: str, aware: bool, seen: _Lineup) -> Recognition | None:
        each = [_attacker(defense, one, name, aware=aware).observation for one in rounds]
        combined = ManyRounds(base=ATTACKS[name])
        try:
            scores = combined(each, seen.everybody, seen.public)
        except InapplicableAttackError:
            return None
        return _scored(f"{name} × {len(rounds)} rounds", aware, scores, seen)

    return _by_all(defense, lineup, run)


def _by_all(
    defense: Defense,
    lineup: "_Lineup",
    run: Callable[[str, bool, "_Lineup"], Recognition | None],
    attacks: Sequence[str] = tuple(ATTACKS),
    *,
    naive: bool = True,
) -> tuple[Recognition, ...]:
    """Return what each attack finds by who does not know the defence, then by who does."""
    ignorant = naive or not defense.names
    found = [run(name, False, lineup) for name in attacks] if ignorant else []
    if defense.names:
        known = lineup.treated(defense.transform)
        found += [run(name, True, known) for name in attacks]
    else:  # nothing to know: who knows it finds the same
        found += [None if one is None else replace(one, adaptive=True) for one in found]
    return tuple(one for one in found if one is not None)


def _attacker(defense: Defense, informed: Observation, name: str, *, aware: bool) -> Attacker:
    found = attackers(defense, informed, ATTACKS[name].uses, inverse=False)
    return found[-1] if aware else found[0]


@dataclass(frozen=True)
class _Lineup:
    """Images to be told apart: those used in each update first, then strangers."""

    suspects: Images
    unseen: Images
    public: Images
    victims: int
    scored: int

    @classmethod
    def of(cls, data: Dataset, used: Tensor, seed: int, scored: int | None) -> "_Lineup | None":
        """Return those of images ``used``, int64 [V, N]; None where there are no strangers."""
        generator = torch.Generator().manual_seed(seed)
        others = strangers_to(data.train, used.flatten(), generator, most=_STRANGERS)
        if not len(others):
            return None
        # A double of an image that was used is no image that nobody trained on.
        test = data.test[~data.test.doubles_of(data.train[used.flatten()])]
        if not len(test):
            raise FedveilError(
                f"every test image of {data.name} is a double of one that was used, so an attacker "
                "has none to learn from, and nobody is told apart: give a test split of its own"
            )
        if scored is not None:
            used = used[:, torch.randperm(used.shape[1], generator=generator)[:scored]]
        return cls(
            data.train[torch.cat([used.flatten(), others])],
            test[_PUBLIC : _PUBLIC + _UNSEEN],
            test[:_PUBLIC],
            victims=len(used),
            scored=used.numel(),
        )

    @property
    def everybody(self) -> Images:
        """Suspects, then images that nobody was ever trained on."""
        return Images.joined([self.suspects, self.unseen])

    def treated(self, transform: nn.Module | None) -> "_Lineup":
        """Return the images as a client would have trained on them."""
        if transform is None:
            return self
        return replace(
            self,
            suspects=self.suspects.transformed(transform),
            unseen=self.unseen.transformed(transform),
            public=self.public.transformed(transform),
        )

    def members(self, values: Tensor) -> Tensor:
        """Return of values [V, M + S] those of each update's own images, [V, M / V]."""
        own = torch.arange(self.scored).view(self.victims, -1)
        return values.gather(1, own)


def _run(name: str, attacker: Attacker, lineup: _Lineup) -> Recognition | None:
    attack, seen = ATTACKS[name], attacker.observation
    try:
        if not isinstance(attack, Span):
            scores = attack(seen, lineup.everybody, lineup.public)
            return _scored(name, attacker.adaptive, scores, lineup)
        scores, sure = attack.judged(seen, lineup.everybody, lineup.public)
    except InapplicableAttackError:
        return None
    found, sure = _scored(name, attacker.adaptive, scores, lineup), sure[:, : len(lineup.suspects)]
    certain = float(lineup.members(sure).double().mean())
    return replace(found, certain=certain, mistaken=int(sure[:, lineup.scored :].sum()))


def _scored(name: str, adaptive: bool, scores: Tensor, lineup: _Lineup) -> Recognition:
    """Return how scores [V, M + S + U] of the lineup part those that were used from others."""
    count = len(lineup.suspects)
    own, others = lineup.members(scores), scores[:, lineup.scored : count]
    unseen = Ranks.of(own, scores[:, count:]) if len(lineup.unseen) else None
    return Recognition(name, adaptive, recognised(own, others), Ranks.of(own, others), unseen)
