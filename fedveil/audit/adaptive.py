"""Who attacks a defence: who does not know of it, and who does."""

from dataclasses import dataclass, replace

from fedveil.attacks.inversion import Observation, Uses
from fedveil.defenses import Defense


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
    defense: Defense, informed: Observation, uses: Uses, *, inverse: bool
) -> list[Attacker]:
    """Return the attackers of one defence, the naive one first.

    Whoever knows the defence is given of it what their attack uses. With an attack that uses
    nothing they search as the naive one does, and compare transformed candidates.

    Args:
        defense: What the client does.
        informed: The observation, with all public knowledge.
        uses: What the attack makes of a known defence.
        inverse: Whether learned inverses are wanted.

    Raises:
        FedveilError: Nothing is known of the defence.
    """
    naive = Attacker(replace(informed, knows=None, sanitizer=None), adaptive=False)
    if not defense.names:
        return [naive]
    transform = defense.transform
    searches = transform is not None and (uses.forward or (uses.linear and transform.linear))
    masks = uses.sanitizer and any(part.masks for part in defense.metadata)
    aware = replace(naive, adaptive=True)
    if searches or (masks and informed.sanitizer is not None):
        observation = replace(
            informed,
            knows=informed.knows if searches else None,
            sanitizer=informed.sanitizer if masks else None,
        )
        aware = Attacker(observation, adaptive=True)
    found = [naive, aware]
    if inverse and transform is not None:
        found.append(replace(aware, inverse=True))
    return found
