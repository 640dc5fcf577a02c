"""Refuses what would silently be wrong, before an update; the rest of the step reads without it."""
