"""Errors a user can meet. Each names the option or object, the value, and the way out."""

from __future__ import annotations


class LowMemError(Exception):
    """Base class of lowmem's errors."""


class OptionError(LowMemError, ValueError):
    """An unknown, ill-typed or contradictory option."""


class BudgetError(LowMemError, ValueError):
    """No plan meets ``options["memory_budget"]``; the message says what the minimum is."""


class CalibrationError(LowMemError, RuntimeError):
    """``options["calibrate"]`` could not run the graph on the call's inputs; the message says why."""


class ScheduleError(LowMemError, RuntimeError):
    """The memory of generated code could not be followed; the message says why."""


class PassError(LowMemError, RuntimeError):
    """A pass failed while ``strict=True``; the message names the pass."""


class ReportError(LowMemError, ValueError):
    """A report was asked of something that lowmem did not compile."""


class GradientError(LowMemError, RuntimeError):
    """A gradient that an optimizer cannot use: sparse, not finite where a basis is computed from it, or of a wrong shape."""
