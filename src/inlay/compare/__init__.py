"""Comparing methods: a resumable grid of methods × seeds, and its report."""

from inlay.compare.run import compare

__all__ = ["compare"]
