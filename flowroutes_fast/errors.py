"""Errors that callers may want to tell apart."""

from __future__ import annotations


class DamagedFile(ValueError):
    """A file of ours that cannot be what was written: cut short, changed, or not of the kind that its name promises."""
