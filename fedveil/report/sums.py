"""Sentences on what sums over clients' images tell of them."""

from collections.abc import Sequence
from dataclasses import replace

from fedveil.report.artifacts import RebuiltFromSums, SumsAudit, SumsRow
from fedveil.report.finding import Finding, interval, percent, worst_of
from fedveil.wording import quantity

IMAGES = "Clients' images"
_CHANCE, _GUESSING = 0.01, 0.5
_SHOWN = 0.9  # correlation from which somebody would call the two one image
_OVER_FLOOR = 0.05
_LOOSE = 0.1  # found by the best attack that noise allows: ε of about 4 and more
_FEWEST = 5  # images rebuilt, of fewer than which nothing is said
_FEW = 0.05  # found by the upper end of the interval, above which nobody is cleared
_TRACED = 0.02  # found where 1 % of others are: twice as many as by chance


def of_sums(audits: Sequence[SumsAudit]) -> tuple[Finding, ...]:
    """Return who is told from sums that servers held; of several audits the worst, if any."""
    if not audits:
        return ()
    return (worst_of([(_of_one(audit), _finds(_strongest(audit))) for audit in audits]),)


def _strongest(audit: SumsAudit) -> SumsRow:
    return max(_held(audit), key=_finds)


def _finds(row: SumsRow) -> tuple[float, float]:
    return row.tpr_at_1_low or 0.0, row.auc_low


def _of_one(audit: SumsAudit) -> Finding:
    row = _strongest(audit)
    topic = "Who is in the sums"
    area = f"an area under the curve of {row.auc:.2f} ({row.auc_low:.2f} to {row.auc_high:.2f})"
    told = (
        f"From the sums of {row.holder} of {audit.subject}, {quantity(row.images, 'image')} and "
        f"{audit.dimension:,} features, {row.attack} tells who is in them with {area}"
    )
    if row.tpr_at_1 is None:
        told += (
            f"; {quantity(audit.strangers, 'other image')} are too few to tell how many are found "
            "at a low rate of error"
        )
    else:
        found = f"{percent(row.tpr_at_1)} are found where 1 % of others are"
        told += f": {found}{interval(row.tpr_at_1_low, row.tpr_at_1_high)}"
    mark, kind = _judged(audit, row)
    return Finding(topic, mark, kind, f"{told}{_foretold(audit)}{_if_alone(audit)}.")


def _judged(audit: SumsAudit, row: SumsRow) -> tuple[str, str]:
    if (row.tpr_at_1_low or 0.0) > _CHANCE:
        return f"{percent(row.tpr_at_1 or 0.0)} found", "bad"
    if audit.forecast is not None and audit.forecast.tpr_at_1 > _TRACED:
        return f"{percent(audit.forecast.tpr_at_1)} to be found", "bad"
    if row.auc_low > _GUESSING:
        return "Nobody named, a little told of all", "unknown"
    if row.tpr_at_1 is None or max(one.tpr_at_1_high or 0.0 for one in _held(audit)) > _FEW:
        return "Cannot tell", "unknown"
    if audit.allowed is not None and audit.allowed.tpr_at_1 > _LOOSE:
        return "Nobody found, much allowed", "unknown"
    if audit.allowed is None and audit.forecast is None:
        return "Nobody found, more not foretold", "unknown"
    return "No better than chance", "good"


def _foretold(audit: SumsAudit) -> str:
    """Say what somebody with more public images than the audit had is to be expected to find."""
    if audit.allowed is not None:
        return (
            f"; the noise would let the best of all attacks find {percent(audit.allowed.tpr_at_1)}"
        )
    if audit.forecast is None:
        return ""
    return (
        f"; it had {quantity(audit.public, 'public image')}, and with {audit.forecast.public:,} "
        f"of the same kind {percent(audit.forecast.tpr_at_1)} are to be expected, which only noise "
        "(--epsilon) or far fewer features prevent"
    )


def _held(audit: SumsAudit) -> Sequence[SumsRow]:
    """Return the rows of sums the server held; of an audit that names none it may be any."""
    return [row for row in audit.rows if row.seen] or audit.rows


def _if_alone(audit: SumsAudit) -> str:
    others = [row for row in audit.rows if not row.seen]
    alone = max(others, key=lambda row: (row.tpr_at_1 or 0.0, row.auc), default=None)
    if alone is None:
        return ""
    told = (
        f"an area of {alone.auc:.2f}"
        if alone.tpr_at_1 is None
        else f"{percent(alone.tpr_at_1)} found"
    )
    return (
        f"; of {alone.holder}'s sums, {quantity(alone.images, 'image')}, which that server did not "
        f"hold, it would be {told}"
    )


def rebuilt_from_sums(audits: Sequence[SumsAudit]) -> Finding:
    """Return what could be rebuilt of clients' images where no updates of a model were attacked.

    Of an image that was not rebuilt nothing is said unless the same search rebuilds images from
    one client's sums.
    """
    tried = [
        (_rebuilt(audit, audit.rebuilt), (_seen_over_floor(audit, audit.rebuilt),))
        for audit in audits
        if audit.rebuilt is not None
    ]
    if not tried:
        return Finding(
            IMAGES,
            "Not measured",
            "unknown",
            "What a server can read of clients' images from what they return was not measured "
            "here.",
        )
    found, left = worst_of(tried), [audit for audit in audits if audit.rebuilt is None]
    if not left:
        return found
    kind = "unknown" if found.kind == "good" else found.kind
    missing = f"of {left[0].subject} no image was searched for"
    return replace(found, kind=kind, sentence=f"{found.sentence.removesuffix('.')}; {missing}.")


def _rebuilt(audit: SumsAudit, own: RebuiltFromSums) -> Finding:
    alone = not any(not row.seen for row in audit.rows)
    seen = own.from_one_client if alone else own.from_the_round
    source = "one client's sums" if alone else "the sums of the round"
    told = (
        f"Searching {quantity(own.images, 'image')} of {audit.subject}{_which(own)}, by {source}, "
        f"gives a correlation of {seen:.2f} with the originals, "
        f"where the nearest public image has {own.floor:.2f}"
    )
    if not alone:
        told += "; one client's sums alone, which that server did not hold, give "
        told += f"{own.from_one_client:.2f}"
    if seen > min(_SHOWN, own.floor + _OVER_FLOOR):
        mark, kind = "Rebuilt" if seen > _SHOWN else "Partly rebuilt", "bad"
    elif own.images < _FEWEST:
        mark, kind = "Too few to tell", "unknown"
    elif own.from_one_client > max(_SHOWN, own.floor):
        mark, kind = "Not rebuilt", "good"
    else:
        mark, kind = "Cannot tell", "unknown"
        told += "; the search rebuilds nothing even there, so that it shows nothing"
    return Finding(IMAGES, mark, kind, f"{told}.")


def _which(own: RebuiltFromSums) -> str:
    if own.lone is None or own.lone == own.images:
        return " alone in their class at a client"
    return f", {own.lone} of them alone in their class at a client"


def _seen_over_floor(audit: SumsAudit, own: RebuiltFromSums) -> float:
    alone = all(row.seen for row in audit.rows)
    return (own.from_one_client if alone else own.from_the_round) - own.floor
