"""Sentences on what was measured, by rule from the numbers; the worst comes first.

The rules never say more than the numbers do. A cap bounds the direct use of a copy, not theft. An
attack that does not know the defence shows nothing about the defence when it fails. Every attack
named is the strongest of those tried, not of those that exist.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, TypeVar

from fedveil.report.artifacts import (
    Artifacts,
    Audit,
    EgressAudit,
    EgressRow,
    Frontier,
    FrontierRow,
    LeakageAudit,
    LeakageRow,
    MembershipRow,
    Points,
    Run,
    TheftAudit,
    TheftRow,
)
from fedveil.report.finding import WORST_FIRST, Finding, interval, percent, points, worst_of
from fedveil.report.sums import IMAGES, of_sums, rebuilt_from_sums
from fedveil.results import IDENTIFIED, PICKED_OUT, learnt_nothing
from fedveil.wording import quantity

_Leaked = LeakageRow | FrontierRow

_FEW = 0.05
_SURELY = 0.5
_FAR = 0.1
# None of n found still allows a rate of 3/n at 95 %.
_ENOUGH = 60
_RARE = 0.025
_COUNTED = 10_000
_CHANCE = 0.01
_EXPERIMENT = (
    "model",
    "dataset",
    "update",
    "batch",
    "aggregate",
    "epochs",
    "batch_size",
    "learning_rate",
    "repeats",
    "recorded",
)
_GUESSING = 0.5
_NAMED = 3
_LONGEST = 300
_WEIGHTS = "/model.safetensors"


def verdict(artifacts: Artifacts) -> tuple[Finding, Finding, Finding]:
    """Return what was found of the copies, of theft and of clients' images, in this order."""
    audited: list[list[_Leaked]] = _apart(
        (audit, row) for audit in artifacts.leakages for row in audit.rows
    )
    # The two are different experiments; one sentence cannot speak of both.
    leakage = audited or _apart((grid, row) for grid in artifacts.frontiers for row in grid.rows)
    returned = [run.returned for run in artifacts.runs]
    if not leakage and not artifacts.sums:
        images = rebuilt_from_sums(())
    elif artifacts.sums and (not leakage or (returned and all(returned))):
        images = _of_other_sums(rebuilt_from_sums(artifacts.sums), artifacts, artifacts.runs)
    else:
        images = worst_of([(_of_leakage(rows), (max(map(_told, rows)),)) for rows in leakage])
        images = _by_earlier_attacks(images, artifacts.leakages or artifacts.frontiers)
        if audited:
            images = _of_other_models(images, artifacts)
    return _of_copies(artifacts.runs), _of_theft(artifacts.thefts, artifacts.runs), images


def _by_earlier_attacks(finding: Finding, audits: Sequence[LeakageAudit | Frontier]) -> Finding:
    """Say where images were picked out by fewer attacks than there are: what these miss is open."""
    earlier = [
        audit.name
        for audit in audits
        if not audit.membership and any(row.picked_out is not None for row in audit.rows)
    ]
    if finding.kind != "good" or not earlier:
        return finding
    missing = (
        f"{', '.join(earlier[:_NAMED])} is of an earlier version, whose one attack that picks "
        "images out missed most that later ones find"
    )
    sentence = f"{finding.sentence.removesuffix('.')}; {missing}."
    return replace(finding, kind="unknown", sentence=sentence)


_AnyRow = TypeVar("_AnyRow", bound=LeakageRow | FrontierRow | MembershipRow)


def _apart(rows: Iterable[tuple[Audit, _AnyRow]]) -> list[list[_AnyRow]]:
    """Return rows by what was attacked: no attack that works on one model clears another's."""
    groups: dict[tuple[str, ...], list[_AnyRow]] = {}
    for audit, row in rows:
        named = [str(audit.settings.get(name)) for name in _EXPERIMENT]
        scenario = row.scenario if isinstance(row, FrontierRow) else None
        groups.setdefault((*named, str(scenario)), []).append(row)
    return [*groups.values()]


def _of_other_models(finding: Finding, artifacts: Artifacts) -> Finding:
    """Say where no audit looked at what a run trained; what leaks elsewhere clears nothing here."""
    looked = {_of_what(a.settings) for a in artifacts.leakages}
    tried = {row.defense for audit in artifacts.leakages for row in audit.rows}
    for run in artifacts.runs:
        own = run.summary.configuration
        defense = (own.model_extra or {}).get("defense", "none")
        if run.returned is not None and any(_is_of(a.subject, run) for a in artifacts.sums):
            continue
        if run.returned is not None:
            missing = (
                f"clients of {run.name} returned {run.returned}, and what was attacked are updates "
                "of a model, which show nothing about that run"
            )
        elif looked and (own.model, own.dataset) not in looked:
            model, dataset = next(iter(sorted(looked, key=str)))
            missing = (
                f"{run.name} trained {own.model} on {own.dataset}, and what was attacked is "
                f"{model} on {dataset}, which shows nothing about that run"
            )
        elif isinstance(defense, str) and defense not in tried:
            missing = f"the defence of {run.name}, {defense}, was not attacked"
        else:
            continue
        kind = "unknown" if finding.kind == "good" else finding.kind
        sentence = f"{finding.sentence.removesuffix('.')}; {missing}."
        return replace(finding, kind=kind, sentence=sentence)
    return finding


def _of_other_sums(finding: Finding, artifacts: Artifacts, runs: Sequence[Run]) -> Finding:
    """Say of which runs no audit looked at the sums; what fails elsewhere clears nothing there."""
    audited = [audit.subject for audit in artifacts.sums]
    left = [run for run in runs if not any(_is_of(subject, run) for subject in audited)]
    if not left:
        return finding
    kind = "unknown" if finding.kind == "good" else finding.kind
    missing = f"what clients of {_names(left)} returned was not attacked"
    return replace(finding, kind=kind, sentence=f"{finding.sentence.removesuffix('.')}; {missing}.")


def _of_what(settings: Mapping[str, Any]) -> tuple[str, str]:
    return str(settings.get("model")), str(settings.get("dataset"))


def ranked(artifacts: Artifacts) -> tuple[Finding, ...]:
    """Return the verdict as the page shows it: what is wrong with the model first, then the worst.

    Nothing is marked good beside a model that is of no use: a cap that holds because nothing was
    learnt protects nothing.
    """
    found: tuple[Finding, ...] = (
        *verdict(artifacts),
        *_of_clients_part(artifacts.runs),
        *of_members(artifacts.leakages),
        *_of_sums(artifacts),
        *of_egress(artifacts.egresses, artifacts.runs),
    )
    leading = _of_models(artifacts.runs)
    if any(map(_useless, artifacts.runs)):
        found = tuple(
            replace(
                finding,
                kind="unknown",
                mark=f"{finding.mark}, of a model of no use",
            )
            if finding.kind == "good"
            else finding
            for finding in found
        )
    if leading is not None:
        found = (leading, *found)
    return tuple(sorted(found, key=lambda finding: WORST_FIRST.index(finding.kind)))


def _of_clients_part(runs: Sequence[Run]) -> Iterator[Finding]:
    """Say of each run that counts the server's own labelled images what clients add to these."""
    for run in runs:
        alone = run.summary.server_alone
        if alone is None:
            continue
        added = alone.gain_low > 0
        told = (
            f"of {run.name} clients add {points(alone.gain)} (95\N{NO-BREAK SPACE}% interval "
            f"{100 * alone.gain_low:.1f} to {100 * alone.gain_high:.1f})"
            if added
            else f"what clients of {run.name} add cannot be told from chance"
        )
        yield Finding(
            "What clients add",
            f"Adds {points(alone.gain)}" if added else "Nothing that can be told",
            "good" if added else "bad",
            f"The server's own {quantity(alone.images, 'labelled image')} alone give a model right "
            f"on {percent(alone.accuracy)} of images; with them the one that is delivered is right "
            f"on {percent(run.summary.accuracy)}: {told}.",
        )


def _of_sums(artifacts: Artifacts) -> tuple[Finding, ...]:
    runs = [run for run in artifacts.runs if run.summary.analytic is not None]
    return tuple(_of_other_sums(one, artifacts, runs) for one in of_sums(artifacts.sums))


def _of_models(runs: Sequence[Run]) -> Finding | None:
    """Return what a manager must know before anything else; None where nothing is."""
    worst = min(runs, key=_over_chance, default=None)
    if worst is None:
        return None
    topic, own = "The owner's model", worst.summary
    if _useless(worst):
        assert own.chance is not None
        best = max(line.accuracy for line in worst.rounds)
        fall = f", after {percent(best)} in an earlier round" if best > 2 * own.chance else ""
        return Finding(
            topic,
            "Of no use",
            "bad",
            f"The model that was trained is of no use: it is right on {percent(own.accuracy)} of "
            f"images, where always naming the commonest class is right on {percent(own.chance)}"
            f"{fall}, so whatever else was measured of {worst.name} protects nothing of value.",
        )
    return _far_behind(topic, runs) or _collapsed(topic, runs) or _met_before(topic, runs)


def _met_before(topic: str, runs: Sequence[Run]) -> Finding | None:
    """Return the run whose accuracy is measured most on doubles of its training images."""
    run = max(runs, key=_doubles)
    if _doubles(run) <= _FEW:
        return None
    own = run.summary
    return Finding(
        topic,
        "Measured on training images",
        "unknown",
        f"Of the {quantity(own.report_images, 'image')} that the model of {run.name} is right on "
        f"{percent(own.accuracy)} of, {own.report_doubles:,} are doubles of images it was trained "
        "on: what it is right on elsewhere is not known, and neither is what a copy is.",
    )


def _doubles(run: Run) -> float:
    return run.summary.report_doubles / max(1, run.summary.report_images)


def _useless(run: Run) -> bool:
    own = run.summary
    return own.chance is not None and learnt_nothing(own.accuracy, own.chance, own.report_images)


def _over_chance(run: Run) -> float:
    return run.summary.accuracy - (run.summary.chance or 0.0)


def _far_behind(topic: str, runs: Sequence[Run]) -> Finding | None:
    """Return the protected run that falls furthest behind the same training without protection."""
    pairs = [
        (other.summary.accuracy - run.summary.accuracy, run, other)
        for run in runs
        for other in runs
        if run.sends != "model" and other.sends == "model" and _same_task(run, other)
    ]
    gap, run, other = max(pairs, key=lambda pair: pair[0], default=(0.0, None, None))
    if run is None or other is None or gap < _FAR:
        return None
    return Finding(
        topic,
        f"{points(gap)} behind",
        "bad",
        f"The protection costs {points(gap)}: {run.name} ends with a model right on "
        f"{percent(run.summary.accuracy)} of images, and the same data without protection "
        f"({other.name}) gives {percent(other.summary.accuracy)}.",
    )


def _collapsed(topic: str, runs: Sequence[Run]) -> Finding | None:
    run = max(runs, key=_fall)
    fall = _fall(run)
    if fall < _FAR:
        return _caught(topic, runs)
    return Finding(
        topic,
        "Collapsed",
        "bad",
        f"Training collapsed: {run.name} ends with a model right on "
        f"{percent(run.summary.accuracy)} of images, {points(fall)} less than in its best round.",
    )


def _caught(topic: str, runs: Sequence[Run]) -> Finding | None:
    """Return the run whose model is of an earlier round, because training collapsed after it."""
    run = max(runs, key=_caught_fall)
    last, number = run.summary.last_accuracy, run.summary.round
    if last is None or number is None or _caught_fall(run) < _FAR:
        return None
    return Finding(
        topic,
        f"Of round {number} of {len(run.rounds)}",
        "unknown",
        f"Training collapsed after round {number}: the model of {run.name} that is delivered is of "
        f"that round, the best on images set apart for the choice, and right on "
        f"{percent(run.summary.accuracy)} of others; the last round's was right on "
        f"{percent(last)}. Another run may find no such round.",
    )


def _caught_fall(run: Run) -> float:
    last = run.summary.last_accuracy
    return 0.0 if last is None else run.summary.accuracy - last


def _fall(run: Run) -> float:
    return max(line.accuracy for line in run.rounds) - run.summary.accuracy


def _same_task(run: Run, other: Run) -> bool:
    return _task(run) == _task(other)


def _task(run: Run) -> tuple[object, ...]:
    own = run.summary.configuration
    extra = own.model_extra or {}
    shared = (str(extra.get(name)) for name in ("clients", "fraction", "partition"))
    return (own.dataset, own.model, own.rounds, *shared)


def _of_copies(runs: Sequence[Run]) -> Finding:
    topic = "Copies clients receive"
    capped = [run for run in runs if run.cap is not None]
    if not runs:
        return Finding(
            topic,
            "Not measured",
            "unknown",
            "No training run was given, so this report says nothing about how good the copies are "
            "that clients receive.",
        )
    bare = [run for run in runs if run.sends == "model"]
    if not capped and not bare:
        return _untrained(topic, runs)
    if not capped:
        best = max(run.best_copy for run in bare)
        return Finding(
            topic,
            "No cap",
            "bad",
            f"Training ran without a cap: clients received copies of up to {percent(best)} "
            "accuracy, which is the owner's model itself.",
        )
    rounds = sum(len(run.rounds) for run in capped)
    over = sum(run.rounds_over_cap for run in capped)
    which = "the run" if len(capped) == 1 else f"the {len(capped)} runs that have a cap"
    owner = _range([run.summary.accuracy for run in capped])
    # The run whose copy came closest to its cap, or passed it by most.
    worst = max(capped, key=lambda run: run.best_copy - (run.cap or 0))
    limits = "bounds direct use of a copy and does not bound theft" + _uncapped(runs)
    measured = f"at most {percent(worst.best_copy)}, the cap being {percent(worst.cap or 0)}"
    if over:
        return Finding(
            topic,
            "Cap passed",
            "bad",
            f"In {over} of {quantity(rounds, 'round')} of {which} a copy passed the accuracy cap "
            f"({measured}), while the owner's model reached {owner}; even a cap that "
            f"holds {limits}.",
        )
    images = min(_images_a_round(run) for run in capped)
    return Finding(
        topic,
        f"Cap held in {len(capped)} of {len(capped) + len(bare)} runs" if bare else "Cap held",
        "unknown" if bare else "good",
        f"In {_every_round(rounds)} of {which} every copy stayed at or below the accuracy cap "
        f"({measured}, on {quantity(images, 'image')} a round that the noise was not set on), "
        f"while the owner's model reached {owner}; such a cap {limits}.{_unlearnt(runs)}",
    )


def _every_round(count: int) -> str:
    return "the one round" if count == 1 else f"all {count:,} rounds"


def _untrained(topic: str, runs: Sequence[Run]) -> Finding:
    """Say of runs that send nothing learnt how good what they send is."""
    told = all(map(_copies_are_bare, runs))
    return Finding(
        topic,
        "Nothing learnt is sent",
        "good" if told else "unknown",
        "Clients received the model as it was before training, in every round of "
        f"{'the run' if len(runs) == 1 else f'the {len(runs)} runs'}: right on at most "
        f"{percent(max(run.best_copy for run in runs))} of images. There is no cap to keep; what "
        "can be made of that model can be made without this training.",
    )


def _unlearnt(runs: Sequence[Run]) -> str:
    """Say of which runs a cap is not asked for, as they sent nothing learnt."""
    kept = [run for run in runs if run.sends == "untrained"]
    if not kept:
        return ""
    return f" Clients of {_names(kept)} were sent nothing that was learnt there."


def _uncapped(runs: Sequence[Run]) -> str:
    """Say which runs beside the capped ones had no cap: nothing held there."""
    bare = [run for run in runs if run.sends == "model"]
    if not bare:
        return ""
    best = percent(max(run.best_copy for run in bare))
    return f", and {_names(bare)} had no cap at all and sent clients the model itself, up to {best}"


def _images_a_round(run: Run) -> int:
    return min(run.summary.configuration.report_images, run.summary.report_images)


def _of_theft(audits: Sequence[TheftAudit], runs: Sequence[Run]) -> Finding:
    topic = "Theft of the model"
    if not audits and runs and all(run.sends == "untrained" for run in runs):
        return Finding(
            topic,
            "Nothing learnt to steal",
            "unknown",
            f"Clients of {_names(runs)} were sent nothing that was learnt, so that a thief is left "
            "with what training alone gives; that nothing else was sent no theft audit has checked "
            "here.",
        )
    if not audits:
        return Finding(
            topic,
            "Not measured",
            "unknown",
            "What a client can make of the copies it received was not measured here, and a low "
            "accuracy of the copies does not show that theft fails.",
        )
    bare = [audit for audit in audits if _of_nothing_learnt(audit, runs)]
    audit, worst = worst_theft(audits, runs)
    how = f"“{worst.attack}” with {_labels(worst)} and {_thieves(worst.colluders)}"
    outcome = f"{percent(worst.accuracy)} where training alone gives {percent(worst.alone)}"
    left = _unattacked(audits, runs)
    if worst.advantage <= 0:
        if nothing := [audit for audit in audits if _nothing_to_gain(audit)]:
            return Finding(
                topic,
                "Nothing to gain",
                "unknown",
                f"No theft gained on training alone, and none could: the model that "
                f"{attacked_run(nothing[0])} keeps is right on {percent(nothing[0].reference or 0)}"
                f", no more than what thieves come to alone{left}.",
            )
        tried = quantity(sum(len(one.rows) for one in audits), "theft")
        open_ = _not_excluded([row for one in audits for row in one.rows])
        return Finding(
            topic,
            "No gain found",
            "unknown" if left or open_ else "good",
            f"Of {tried} tried on the copies of {', '.join(map(attacked_run, audits))} none gained "
            f"on training alone: the best, {how}, reached {outcome}, and a thief who tries "
            f"something else may do better{open_}{left}.",
        )
    spread = ""
    low, high = worst.advantage_low, worst.advantage_high
    # Of one thief, or of several that came to the same, nothing tells how far others lie.
    if low is not None and high is not None and low < high:
        spread = f" (95\N{NO-BREAK SPACE}% interval {100 * low:.1f} to {100 * high:.1f})"
    if audit in bare:
        return Finding(
            topic,
            "Nothing learnt to steal",
            "unknown",
            f"Clients of {attacked_run(audit)} were sent nothing that was learnt: that {how} "
            f"reached {outcome} is how two ways to train alone differ, and a gain that lasts over "
            f"many thieves would show that something else was sent{left}.",
        )
    return Finding(
        topic,
        f"Gains {points(worst.advantage)}",
        "bad",
        f"A thief gains up to {points(worst.advantage)}{spread} from the copies of "
        f"{attacked_run(audit)}: of the thefts tried, {how} reached {outcome}, and a thief who "
        f"tries something else may gain more{left}.",
    )


def _not_excluded(rows: Sequence[TheftRow]) -> str:
    """Say which gain was not found and may be there all the same; nothing where it is small."""
    highs = [
        row.advantage_high
        for row in rows
        if None not in (row.advantage_low, row.advantage_high)
        and row.advantage_low != row.advantage_high
    ]
    if len(highs) < len(rows):
        return (
            "; how far thieves lie from one another was not measured, so that a gain may be missed"
        )
    most = max(high for high in highs if high is not None)
    if most <= _FEW:
        return ""
    return f"; a gain of {points(most)} is within the interval of what was measured"


def _of_nothing_learnt(audit: TheftAudit, runs: Sequence[Run]) -> bool:
    """Say whether an audit is of runs given here alone whose clients were sent nothing learnt."""
    own = [run for run in runs if _is_of(attacked_run(audit), run)]
    return bool(own) and all(run.sends == "untrained" and _copies_are_bare(run) for run in own)


def _copies_are_bare(run: Run) -> bool:
    """Say whether what a run sent is no better than naming the commonest class."""
    own = run.summary
    return own.chance is not None and learnt_nothing(
        run.best_copy, own.chance, _images_a_round(run)
    )


def _nothing_to_gain(audit: TheftAudit) -> bool:
    """Say whether the owner's model itself is no better than all that thieves have alone."""
    return audit.reference is not None and audit.reference <= min(row.alone for row in audit.rows)


def worst_theft(audits: Sequence[TheftAudit], runs: Sequence[Run]) -> tuple[TheftAudit, TheftRow]:
    """Return the theft that gains most on training alone, and the audit that found it.

    Where something that was learnt was sent it counts before luck where nothing was.

    Args:
        audits: At least one.
        runs: That are known.
    """
    counted = [audit for audit in audits if not _of_nothing_learnt(audit, runs)]
    pairs = [(audit, row) for audit in counted or audits for row in audit.rows]
    return max(pairs, key=lambda pair: pair[1].advantage)


def attacked_run(audit: TheftAudit) -> str:
    """Return which run's copies a theft audit attacked; audits of earlier versions do not say."""
    return str(audit.settings.get("run") or f"a run that {audit.name} does not name")[:_LONGEST]


def _unattacked(audits: Sequence[TheftAudit], runs: Sequence[Run]) -> str:
    """Say which runs' copies no theft was tried on; what fails elsewhere clears nothing there."""
    left = [
        run
        for run in runs
        if run.sends != "untrained"
        and not any(_is_of(attacked_run(audit), run) for audit in audits)
    ]
    return f"; on the copies of {_names(left)} none was tried" if left else ""


def _names(runs: Sequence[Run]) -> str:
    others = " and others" if len(runs) > _NAMED else ""
    return ", ".join(run.name for run in runs[:_NAMED]) + others


def _is_of(attacked: str, run: Run) -> bool:
    """Say whether an audit is of a run: one path must end in the other, wherever each was begun."""
    one, other = PurePath(attacked).parts, PurePath(run.name).parts
    shared = min(len(one), len(other))
    return shared > 0 and one[-shared:] == other[-shared:]


def _labels(row: TheftRow) -> str:
    held = [min(row.labels, count) for count in row.labels_held] or [row.labels]
    if max(held) == 0:
        return "no label"
    if min(held) == max(held):
        return quantity(held[0], "labelled image")
    return f"{min(held):,} to {max(held):,} labelled images"


def of_egress(audits: Sequence[EgressAudit], runs: Sequence[Run] = ()) -> tuple[Finding, ...]:
    """Return what the delivered models tell of who was in their training; the worst, if any.

    What is not found in one model clears no other: neither one of which an audit cannot tell, nor a
    run that was not audited.
    """
    if not audits:
        return ()
    told = worst_of([(_of_one_egress(audit), _finds(_strongest(audit))) for audit in audits])
    left = [
        run
        for run in runs
        if not any(_is_of(audit.subject.removesuffix(_WEIGHTS), run) for audit in audits)
    ]
    if not left:
        return (told,)
    kind = "unknown" if told.kind == "good" else told.kind
    missing = f"what the model of {_names(left)} tells was not audited"
    sentence = f"{told.sentence.removesuffix('.')}; {missing}."
    return (replace(told, kind=kind, sentence=sentence),)


def _strongest(audit: EgressAudit) -> EgressRow:
    return max(audit.rows, key=_finds)


def _finds(row: EgressRow) -> tuple[float, float]:
    return row.tpr_at_1_low or 0.0, row.auc_low


def _of_one_egress(audit: EgressAudit) -> Finding:
    row, topic = _strongest(audit), "Who was in the training"
    how = f"the strongest attack tried ({row.attack}) tells members of {audit.subject} from others"
    spread = f"({row.auc_low:.2f} to {row.auc_high:.2f})"
    told = f"From the delivered model {how} with an area under the curve of {row.auc:.2f} {spread}"
    few = row.tpr_at_1 is None or row.tpr_at_1_low is None
    if row.tpr_at_1 is None or row.tpr_at_1_low is None:
        told += (
            f"; {audit.others:,} other images are too few to tell how many members are found at a "
            "low rate of error"
        )
        found = f"AUC {row.auc:.2f}"
    else:
        told += f": {percent(row.tpr_at_1)} of members are found where 1 % of others are called "
        told += f"members{interval(row.tpr_at_1_low, row.tpr_at_1_high)}{_at_a_thousandth(row)}"
        found = f"{percent(row.tpr_at_1)} found"
    more = "an attacker with more shadow models may find more"
    if (row.tpr_at_1_low or 0.0) > _CHANCE or row.auc_low > _GUESSING:
        return Finding(topic, found, "bad", f"{told}; {more}.")
    if not audit.told:
        return Finding(topic, "Cannot tell", "unknown", f"{told}. {' '.join(audit.untold[:1])}")
    below = min(audit.rows, key=lambda one: one.auc_high)
    if below.auc_high < _GUESSING:
        return Finding(
            topic,
            "Cannot tell",
            "unknown",
            f"{told}; by {below.attack} members score below others, with an area of "
            f"{below.auc:.2f} ({below.auc_low:.2f} to {below.auc_high:.2f}), so that the two kinds "
            "of images differ in more than training.",
        )
    if few or max(one.tpr_at_1_high or 0.0 for one in audit.rows) > _FEW:
        return Finding(topic, "Cannot tell", "unknown", f"{told}.")
    if all(one.attack == "loss" for one in audit.rows):
        return Finding(topic, "Only the loss was tried", "unknown", f"{told}; {more}.")
    return Finding(topic, "No better than chance", "good", f"{told}; {more}.")


def of_members(audits: Sequence[LeakageAudit]) -> tuple[Finding, ...]:
    """Return what clients' updates tell of which images were used; none where nobody asked.

    As of reconstructions, the defence that tells least counts, each by the strongest attack of
    those who know it, and its silence counts only where the attacks work without it.
    """
    every = ((audit, row) for audit in audits for row in audit.membership if row.adaptive)
    found = [(_of_some_members(rows), max(map(_recognises, rows))) for rows in _apart(every)]
    return (worst_of(found),) if found else ()


def _of_some_members(rows: Sequence[MembershipRow]) -> Finding:
    worst: dict[str, MembershipRow] = {}
    for row in rows:
        worst[row.defense] = max(worst.get(row.defense, row), row, key=_recognises)
    plain = worst.pop("none", None)
    row = min(worst.values(), key=_recognises, default=plain or rows[0])
    if plain is not None and worst:
        tried = {one.attack for one in rows if one.defense == row.defense}
        shown = (one for one in rows if one.defense == "none" and one.attack in tried)
        plain = max(shown, key=_recognises, default=None)
    points, topic = row.strangers, "Who was in an update"
    under = "without a defence" if row is plain else f"under {row.defense}"
    told = (
        f"From a client's update, {under}, the strongest attack tried ({row.attack}) tells images "
        f"that were used from others with an area under the curve of {points.auc:.2f}"
        f"{_between(points.auc_low, points.auc_high)}"
    )
    if points.tpr_at_1 is not None:
        told += (
            f": {percent(points.tpr_at_1)} of them are found where 1 % of others are called used"
            + interval(points.tpr_at_1_low, points.tpr_at_1_high)
            + _at_a_thousandth(points)
        )
    if row.certain:
        told += f"; {percent(row.certain)} beyond doubt"
    if _tells(row):
        share = points.auc if points.tpr_at_1 is None else points.tpr_at_1
        mark = f"AUC {share:.2f}" if points.tpr_at_1 is None else f"{percent(share)} found"
        return Finding(topic, mark, "bad", f"{told}; stronger attacks may exist.")
    if points.tpr_at_1 is None or points.auc_low is None:
        few = "the images are too few to tell how many are found at a low rate of error"
        return Finding(topic, "Cannot tell", "unknown", f"{told}; {few}.")
    if row is plain or plain is None or not _tells(plain):
        weak = "attacks that find nothing without a defence show nothing"
        return Finding(topic, "Attacks too weak", "unknown", f"{told}; {weak}.")
    rare = points.tpr_at_1_high is not None and points.tpr_at_1_high <= _FEW
    mark, kind = ("No better than chance", "good") if rare else ("Cannot tell", "unknown")
    return Finding(topic, mark, kind, f"{told}; stronger attacks may exist.")


def _recognises(row: MembershipRow) -> tuple[float, ...]:
    """Return numbers that are the greater the worse; what could not be told is no share of 0."""
    points = row.strangers
    untold = points.tpr_at_1 is None
    return _tells(row), untold, points.tpr_at_1 or 0.0, points.auc, row.picked_out


def _tells(row: MembershipRow) -> bool:
    points = row.strangers
    return (
        (points.tpr_at_1_low or 0.0) > _CHANCE
        or (points.auc_low or 0.0) > _GUESSING
        or bool(row.certain)
    )


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"


def _at_a_thousandth(row: EgressRow | Points) -> str:
    if row.tpr_at_01 is None:
        return ", at 0.1 % cannot be told"
    return f", {percent(row.tpr_at_01)} where 0.1 % are"


def _of_leakage(rows: Sequence[_Leaked]) -> Finding:
    topic = IMAGES
    plain = [row for row in rows if row.defense == "none"]
    informed = {_name(row) for row in rows if row.adaptive and row.defense != "none"}
    defended = [row for row in rows if row.defense != "none" and _name(row) in informed]
    uninformed = [row for row in rows if row.defense != "none" and _name(row) not in informed]
    least: _Leaked | None = None
    parts = []
    if plain:
        parts.append(f"without a defence {_rebuilt(max(plain, key=_leaks))}")
    if defended:
        worst = [max(_under(defended, name), key=_leaks) for name in sorted(informed)]
        least = min(worst, key=_leaks)
        among = ", of the defences tried the one that leaks least," if len(worst) > 1 else ""
        knowing = "knowing it" if least.adaptive else "not even knowing it"
        parts.append(f"under {_name(least)}{among} {_rebuilt(least)}, {knowing}")
    elif uninformed:
        parts.append(
            f"the defence {_name(uninformed[0])} was attacked only by those who do not know it, "
            "which shows nothing about what it withstands"
        )
    if not plain and not defended:
        return Finding(topic, "Not tested", "unknown", f"{parts[0][0].upper()}{parts[0][1:]}.")
    under = _under(defended, _name(least)) if least else []
    tried = {_attack(row) for row in under}
    mark, kind, caveat = _judgement(
        [row for row in plain if not under or _attack(row) in tried], least, under
    )
    return Finding(topic, mark, kind, f"From a client's update {_joined(parts)}; {caveat}.")


def _judgement(
    plain: Sequence[_Leaked], least: _Leaked | None, under: Sequence[_Leaked]
) -> tuple[str, str, str]:
    """Return mark, kind and caveat; an attack must be shown to work before its failure counts."""
    undefended = max((_told(row) for row in plain), default=None)
    seen = [least] if least else plain
    top = max(_told(row) for row in seen)
    how = IDENTIFIED if any(row.identified == top for row in seen) else PICKED_OUT
    mark = f"{percent(top)} {how.heading}"
    if top > _FEW and not any(_above_floor(row) for row in seen):
        return (
            "At the floor",
            "unknown",
            (
                "that is no more than images without content reach by the same scorer, and shows "
                "neither that images leak nor that they do not"
            ),
        )
    if top > _FEW:
        return mark, "bad", "stronger attacks may exist"
    if undefended is None:
        return (
            mark,
            "unknown",
            ("whether these attacks succeed at all, without a defence, was not measured"),
        )
    if undefended <= _SURELY or not any(_above_floor(row) for row in plain):
        return (
            "Attacks too weak",
            "unknown",
            ("attacks that hardly succeed without a defence show nothing about one"),
        )
    if least is not None and least.images is not None and least.images < _ENOUGH:
        return mark, "unknown", f"of {quantity(least.images, 'image')} nothing can be called rare"
    ended = {_attack(row) for row in under if not row.untold}
    rebuilt = any(row.identified > _SURELY for row in plain)
    if least is not None and not any(
        (row.identified if rebuilt else _told(row)) > _SURELY and _above_floor(row)
        for row in plain
        if _attack(row) in ended
    ):
        return (
            mark,
            "unknown",
            "the attack's search ended at its limit or without an answer, so that a low share "
            "shows nothing",
        )
    floor = max((row.identified_floor or 0.0 for row in seen), default=0.0)
    if floor > _FEW:
        return (
            mark,
            "unknown",
            f"images without content reach {percent(floor)} by the same scorer, so that a low "
            "share shows nothing",
        )
    return mark, "good", "stronger attacks may exist"


def _rebuilt(row: _Leaked) -> str:
    known = f"let {percent(row.identified)} of the images be {IDENTIFIED.heading}"
    known += interval(row.identified_low, row.identified_high)
    if row.identified_floor is not None:
        known += f" where images without content reach {percent(row.identified_floor)}"
    if row.picked_out is not None:
        known += f", and {percent(row.picked_out)} be {PICKED_OUT.heading}"
    if isinstance(row, LeakageRow) and row.defense == "none":
        return (
            f"the strongest attack tried ({row.attack}) rebuilt {percent(row.exact)} of "
            f"{quantity(row.images, 'image')} exactly and {known}"
        )
    cost = ""
    if isinstance(row, FrontierRow):
        cost = f", the model being {percent(row.accuracy)} accurate"
    return f"the strongest attack tried ({row.attack}) {known}{cost}"


def _told(row: _Leaked) -> float:
    """Return which share of the images could be told, rebuilt or not."""
    return max(row.identified, row.picked_out or 0.0)


def _above_floor(row: _Leaked) -> bool:
    """Say whether more was told than images without content, or scores without, would tell.

    A row without floors, of an earlier version, is taken at its word; ``without_floor`` names it.
    """
    pairs = (
        (row.identified, row.identified_floor),
        (row.picked_out, row.picked_out_floor),
    )
    return any(
        share is not None and share > 0 and (floor is None or _beats(share, floor, row.images or 1))
        for share, floor in pairs
    )


def _beats(share: float, floor: float, images: int) -> bool:
    """Say whether chance alone would reach a share in fewer than 2.5 % of audits.

    Where nothing is told each image is found at the floor's rate, whichever update it shares, so
    that the number found is binomial.
    """
    if share <= floor:
        return False
    found = round(share * images)
    if images > _COUNTED:
        return share - floor > 1.96 * math.sqrt(floor * (1 - floor) / images)
    if floor == 0:
        return found > 0
    fewer = sum(
        math.exp(
            math.lgamma(images + 1)
            - math.lgamma(k + 1)
            - math.lgamma(images - k + 1)
            + k * math.log(floor)
            + (images - k) * math.log1p(-floor)
        )
        for k in range(found)
    )
    return 1 - fewer < _RARE


def without_floor(audits: Sequence[LeakageAudit | Frontier]) -> tuple[str, ...]:
    """Return the audits whose shares have no floor beside them, as earlier versions wrote them."""
    return tuple(
        audit.name for audit in audits if any(row.identified_floor is None for row in audit.rows)
    )


def _leaks(row: _Leaked) -> tuple[float, float, bool, float]:
    return _told(row), row.identified, row.adaptive, row.psnr_original


def _name(row: _Leaked) -> str:
    if isinstance(row, LeakageRow) or not row.strength_text:
        return row.defense
    return f"{row.defense} at {row.strength_text}"


def _attack(row: _Leaked) -> str:
    return row.attack.removesuffix("+inverse")


def _under(rows: Sequence[_Leaked], name: str) -> list[_Leaked]:
    return [row for row in rows if _name(row) == name]


def _thieves(count: int) -> str:
    return "one client" if count <= 1 else f"{count} colluding clients"


def _range(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


def _joined(parts: Sequence[str]) -> str:
    return ", and ".join(parts)
