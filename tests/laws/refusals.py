"""What methods may refuse, with the reason they must give. Everything else must be supported."""

from __future__ import annotations

from laws.cases import Case


def refused(case: Case) -> str | None:
    """A pattern of the reason if this method must refuse this bench, else None."""
    for names, benches, reason in REFUSALS:
        if case.method.name() in names and case.bench.name in benches:
            return reason
    return None


REFUSALS: list[tuple[set[str], set[str], str]] = []
