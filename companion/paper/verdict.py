"""The verdict on a measured value, from one vocabulary for every table, page and command."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from companion.comparisons import ALPHA, Comparison
from llava_core.registry import unknown
from llava_core.runtime import DataError


class Verdict(StrEnum):
    """How a measured value compares with a claim of the paper."""

    AGREES = "agrees"
    """The measured direction, bound or value is the claimed one."""
    DISAGREES = "disagrees"
    """The measured value is not the claimed one."""
    NOT_RESOLVED = "not resolved"
    """The interval contains zero, one seed has no interval, the run was shortened, or no record exists."""
    NO_DIFFERENCE = "no difference"
    """The difference is smaller than the margin of equivalence that the protocol states."""
    CANNOT_BE_TESTED = "cannot be tested"
    """No arm is above a blind guess and above the look-up table of training answers."""
    SHOWN_ONLY = "shown only"
    """This scale has a value, but the claim cannot be tested with it."""

    @classmethod
    def _missing_(cls, value: object) -> Verdict:
        raise DataError(f"{unknown('verdict', str(value), cls)}; run its chapter again")

    @property
    def css_class(self) -> str:
        """The class in book/assets/companion.css."""
        return self.value.replace(" ", "-")


def verdict_of(holds: bool | None) -> Verdict:
    """Return the verdict on a claim that is checked directly; None: not testable at this scale."""
    if holds is None:
        return Verdict.SHOWN_ONLY
    return Verdict.AGREES if holds else Verdict.DISAGREES


def verdict_of_interval(interval: Sequence[float] | None, direction: str | None) -> Verdict:
    """Return the verdict on a claimed sign, from the 95 % interval of the measured difference (None: a single seed)."""
    if direction is None:
        return Verdict.SHOWN_ONLY
    if interval is None or interval[0] <= 0 <= interval[1]:
        return Verdict.NOT_RESOLVED
    return verdict_of((interval[1] < 0) == (direction == "below 0"))


def verdict_of_value(published: float, interval: Sequence[float] | None) -> Verdict:
    """Return the verdict on a published value, from the 95 % interval of the measured one (None: not comparable)."""
    return verdict_of(None if interval is None else interval[0] <= published <= interval[1])


def verdict_of_difference(
    result: Comparison, direction: str | None, *, p: float, margin: float | None, testable: bool = True
) -> Verdict:
    """Return the verdict on a claimed sign, from a comparison of two arms.

    Args:
        direction: `below 0` or `above 0`; None: the paper claims nothing about it.
        p: of no difference, after the correction for the family.
        margin: of equivalence, in points; None: equivalence is not tested.
        testable: whether an arm is above chance and above the look-up table.
    """
    if not testable:
        return Verdict.CANNOT_BE_TESTED
    if p < ALPHA:
        return Verdict.SHOWN_ONLY if direction is None else verdict_of((result.effect < 0) == (direction == "below 0"))
    if margin is not None and result.equivalence_p(margin) < ALPHA:
        return Verdict.NO_DIFFERENCE
    return Verdict.NOT_RESOLVED
