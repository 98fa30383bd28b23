"""Contributions and graphs."""
