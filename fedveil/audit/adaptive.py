"""For every defence the attack that knows of it, and the work that broke it.

What only withstands those who do not know of it is no defence (Athalye et al., "Obfuscated
Gradients Give a False Sense of Security", ICML 2018; Tramèr et al., "On Adaptive Attacks to
Adversarial Example Defenses", NeurIPS 2020), so the audit scores none that is missing here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedveil.attacks.inversion import Observation
from fedveil.defenses import Defense
from fedveil.errors import FedveilError


@dataclass(frozen=True)
class Adaptive:
    """What the suite does against one defence once it knows of it.

    Attributes:
        attack: In words, for the table.
        broken_by: The paper that showed it, or says what remains.
        inverse: Whether a learned inverse is put on top of the reconstruction.
        masks: Whether a search leaves something of the update out of its comparison, or changes it.
    """

    attack: str
    broken_by: str
    inverse: bool = False
    masks: bool = False


_RANGE = "the search is over the transformation's range only; a learned inverse on top"
_BALUNOVIC = 'Balunović et al., "Bayesian Framework for Gradient Leakage", ICLR 2022'
_WU = 'Wu et al., "Learning to Invert: Simple Adaptive Attacks for Gradient Inversion", UAI 2023'
_GEIPING = 'Geiping et al., "Inverting Gradients", NeurIPS 2020'
_ATS = (
    f"{_BALUNOVIC} (against the transformations of Gao et al., CVPR 2021, by a known forward pass)"
)

ADAPTIVE: Mapping[str, Adaptive] = {
    "dct": Adaptive(_RANGE, _ATS, inverse=True),
    "dct-random": Adaptive(
        "exact attacks search all images and find the transformed one, whose missing coefficients "
        "a learned inverse fills; ig takes the expectation over masks drawn anew each step",
        "Athalye et al., ICML 2018 (expectation over transformation)",
        inverse=True,
    ),
    "jpeg": Adaptive(
        "exact attacks search all images and find the decoded one; ig has the differentiable codec "
        "inside its forward pass; a learned inverse on top",
        "Athalye et al., ICML 2018 (a differentiable stand-in in the backward pass)",
        inverse=True,
    ),
    "blur": Adaptive(_RANGE, _ATS, inverse=True),
    "down": Adaptive(_RANGE, _ATS, inverse=True),
    "prune": Adaptive(
        "only entries that were sent are compared", f"{_BALUNOVIC}; {_WU}", masks=True
    ),
    "clip": Adaptive(
        "the candidate's update is clipped too; ig compares directions, which clipping keeps",
        _GEIPING,
        masks=True,
    ),
    "noise": Adaptive("priors on images in ig; nothing is masked", f"{_BALUNOVIC}; {_WU}"),
    "soteria": Adaptive("the perturbed layer's entries are not compared", _BALUNOVIC, masks=True),
    "dp-sgd": Adaptive(
        "priors on images in ig, which compares directions",
        "none where ε is small: the guarantee holds; Hayes et al., NeurIPS 2023, bound "
        "reconstruction by it",
    ),
}
"""Name of a defence to the attack that knows of it."""


@dataclass(frozen=True)
class Attacker:
    """One attacker of a defence.

    Attributes:
        observation: What they have.
        adaptive: Whether they know of the defence. A known transformation is also applied to the
            candidates of an identification, unless a learned inverse stands at the end.
        inverse: Whether a learned inverse goes on top of what they find.
    """

    observation: Observation
    adaptive: bool
    inverse: bool = False


def attackers(
    defense: Defense, informed: Observation, attack: str, *, inverse: bool
) -> list[Attacker]:
    """Return the attackers of one defence, the naive one first.

    Args:
        defense: What the client does.
        informed: The observation, with all public knowledge.
        attack: As ``fedveil.attacks.inversion.build_attack`` reads it, or ``MEMBERSHIP``.
        inverse: Whether learned inverses are wanted.

    Raises:
        FedveilError: The defence has no adaptive attack.
    """
    naive = Attacker(replace(informed, knows=None, sanitizer=None), adaptive=False)
    if not defense.names:
        return [naive]
    known = adaptive_for(defense)
    name, transform = attack.partition(":")[0], defense.transform
    searches = transform is not None and (transform.linear or name in _FORWARD)
    masks = (
        informed.sanitizer is not None and name in _MASKING and any(part.masks for part in known)
    )
    aware = naive
    if searches or masks:
        observation = replace(
            informed,
            knows=informed.knows if searches else None,
            sanitizer=informed.sanitizer if masks else None,
        )
        aware = Attacker(observation, adaptive=True)
    elif transform is not None or not any(part.masks for part in known):
        # The same search: it has no use for what is known. Whoever knows a transformation still
        # compares transformed candidates.
        aware = replace(naive, adaptive=True)
    found = [naive, aware] if aware.adaptive else [naive]
    if inverse and any(part.inverse for part in known):
        found.append(replace(aware, adaptive=True, inverse=True))
    return found


_FORWARD = frozenset({"ig", "ig-bn"})
"""Attacks that take any differentiable transformation into their forward pass."""

MEMBERSHIP = "membership"
"""The attack that has candidates and rebuilds nothing."""

_MASKING = frozenset({"dlg", "fc", "idlg", "ig", "ig-bn", "lm", MEMBERSHIP})
"""Attacks that compare only what a sanitiser left; ``rgap`` needs all of an update."""


def adaptive_for(defense: Defense) -> list[Adaptive]:
    """Return the adaptive attack of each part of a defence.

    Raises:
        FedveilError: There is none for a part, so the defence cannot be audited.
    """
    for name in defense.names:
        if name not in ADAPTIVE:
            raise FedveilError(
                f"defence {name!r} has no adaptive attack, and one that is scored without it is "
                "not scored; name what the suite does against it in fedveil/audit/adaptive.py"
            )
    return [ADAPTIVE[name] for name in defense.names]


def table() -> str:
    """Return the defences and their attacks as Markdown."""
    lines = ["| defence | adaptive attack | who broke it |", "|---|---|---|"]
    lines += [f"| `{name}` | {a.attack} | {a.broken_by} |" for name, a in ADAPTIVE.items()]
    return "\n".join(lines) + "\n"
