"""Proves a configuration by comparing one of its windows with one big batch.

Reading order: prove, capture, reference, compare, result.
"""
