"""Decides which samples make which step, and what is divided by what.

Nothing in here communicates with other ranks or uses private names of torch.
"""
