"""Which technical control stands for what an officer has to answer, by what evidence, how far."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.report.artifacts import Artifacts, Run
from fedveil.report.finding import percent, points
from fedveil.report.verdict import attacked_run, verdict, worst_theft
from fedveil.wording import quantity

_NOTHING = "none in what was given"


@dataclass(frozen=True)
class Control:
    """A row of the table of controls.

    Attributes:
        question: What is asked, and by which catalogue.
        control: What was in force.
        evidence: What was measured of it here.
        limit: What it does not bound, or was not measured.
    """

    question: str
    control: str
    evidence: str
    limit: str


def controls(artifacts: Artifacts) -> tuple[Control, ...]:
    """Return the rows: weights that leave, theft by retraining, gradient leakage, privacy budget.

    The questions are those of SATRE 3.3.07 (may model weights leave the environment, and under
    which technical controls) and of the Coalition for Secure AI's risk of gradient leakage.
    """
    copies, theft, images = verdict(artifacts)
    return (
        Control(
            "May weights leave, and under which technical controls? (SATRE 3.3.07)",
            _kept(artifacts.runs),
            copies.sentence,
            "a cap bounds what a copy does as it is, not what can be made of it",
        ),
        Control(
            "Can a party that receives weights rebuild the model?",
            _kept(artifacts.runs),
            _theft(artifacts) or theft.sentence,
            "a thief may try what was not tried here"
            if artifacts.thefts
            else "not measured: run fedveil audit theft",
        ),
        Control(
            "Can training data be read from updates? (CoSAI: gradient leakage)",
            _defended(artifacts.runs),
            images.sentence,
            "of the attacks, images and models named, no others"
            if artifacts.leakages or artifacts.frontiers or artifacts.sums
            else _not_measured(artifacts.runs),
        ),
        Control(
            "Is what one record gives away bounded, whatever the attack?",
            _private(artifacts.runs),
            _budget(artifacts.runs),
            "ε counts what the run released, not earlier runs on the same data",
        ),
    )


def _not_measured(runs: Sequence[Run]) -> str:
    sums = any(run.summary.analytic is not None for run in runs)
    return f"not measured: run fedveil audit {'sums' if sums else 'leakage'}"


def _kept(runs: Sequence[Run]) -> str:
    words = []
    for run in runs:
        strategy = run.summary.configuration.strategy
        shared = (run.summary.configuration.model_extra or {}).get("shared_rounds", 0)
        if run.sends == "untrained":
            words.append(f"nothing that was learnt is sent ({strategy})")
        elif shared:
            first = quantity(shared, "round") if isinstance(shared, int) else f"{shared} rounds"
            words.append(f"what {first} of plain averaging gave is sent ({strategy})")
        elif run.cap is not None:
            words.append(f"copies under a cap of {percent(run.cap)} ({strategy})")
        else:
            words.append(f"none: clients receive the model itself ({strategy})")
    return "; ".join(dict.fromkeys(words)) or _NOTHING


def _defended(runs: Sequence[Run]) -> str:
    words = []
    for run in runs:
        extra = run.summary.configuration.model_extra or {}
        defense = str(extra.get("defense") or "none")
        parts = [f"defence {defense}"]
        if extra.get("secure_aggregation") is True:
            parts.append("the server learns the clients' sum only (SecAgg+)")
        words.append(", ".join(parts))
    return "; ".join(dict.fromkeys(words)) or _NOTHING


def _private(runs: Sequence[Run]) -> str:
    words = [
        "noise in what clients return" if run.summary.privacy.unit else "DP-SGD"
        for run in runs
        if run.summary.privacy is not None
    ]
    return "; ".join(dict.fromkeys(words)) or _NOTHING


def _budget(runs: Sequence[Run]) -> str:
    told = [
        f"{run.name}: "
        + (
            f"ε not known, {one.reason}"
            if one.epsilon is None
            else f"ε = {one.epsilon:.3g} at δ = {one.delta:g}, for {one.adjacency}"
        )
        for run in runs
        if (one := run.summary.privacy) is not None
    ]
    return "; ".join(told) or "no bound holds: nothing was trained under differential privacy"


def _theft(artifacts: Artifacts) -> str:
    if not artifacts.thefts:
        return ""
    audit, worst = worst_theft(artifacts.thefts, artifacts.runs)
    tried = quantity(sum(len(one.rows) for one in artifacts.thefts), "theft")
    return (
        f"of {tried} tried the best gains {points(worst.advantage)} on training alone, from the "
        f"copies of {attacked_run(audit)} ({percent(worst.accuracy)} against "
        f"{percent(worst.alone)}, {worst.attack})"
    )
