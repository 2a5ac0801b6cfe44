"""The errors inlay raises on purpose: each says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InlayError(Exception):
    """Base of all errors that inlay raises on purpose."""


class OptionError(InlayError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class SiteError(InlayError, ValueError):
    """`where` matches nothing, or a method cannot act on the site it was given."""


class ComposeError(InlayError, ValueError):
    """Methods that cannot stand together at one site, in that order."""


class AdapterError(InlayError, ValueError):
    """An adapter is unknown, already there, or in a state that forbids the call."""


class RouteError(InlayError, ValueError):
    """Rows of a batch cannot be sent to the adapters asked for."""


class MergeError(InlayError, RuntimeError):
    """A merge or an export is impossible, or was not equal to the adapted model."""


class CheckpointError(InlayError, ValueError):
    """A saved adapter is damaged, incomplete, or belongs to another base model."""


class CalibrationError(InlayError, ValueError):
    """Batches from which a method cannot start: none, too few, without labels, or with numbers that are not finite."""


class FusionError(InlayError, ValueError):
    """Models whose logits cannot be fused: other vocabularies, no decoders, padding that cannot be told."""


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the nearest known names, else an empty string."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
