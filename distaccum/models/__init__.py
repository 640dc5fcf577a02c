"""Defines models, which know nothing about accumulation and never return a mean."""
