"""Classifiers that follow in closed form from sums over images, so that nothing is trained."""

from fedveil.analytic.classifier import (
    AnalyticClassifier,
    load_classifier,
    steepness_for,
    sums_of,
)
from fedveil.analytic.ridge import Head, balanced, ridge
from fedveil.analytic.rows import rows_of
from fedveil.analytic.statistics import (
    FRACTION_BITS,
    MOST_IMAGES,
    Layout,
    Statistics,
    quantised,
)

__all__ = [
    "FRACTION_BITS",
    "MOST_IMAGES",
    "AnalyticClassifier",
    "Head",
    "Layout",
    "Statistics",
    "balanced",
    "load_classifier",
    "quantised",
    "ridge",
    "rows_of",
    "steepness_for",
    "sums_of",
]
