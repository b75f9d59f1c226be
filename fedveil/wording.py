"""Sentences whose numbers agree with their nouns."""


def quantity(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless the count is one.

    Args:
        count: Of what the noun names.
        noun: In the singular; its plural must end in a bare ``s``.

    Example:
        >>> quantity(1, "round"), quantity(2_000, "training image")
        ('1 round', '2,000 training images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
