"""Decides which samples make which step, what is divided by what, and what a window sends.

Nothing in here communicates with other ranks or uses private names of torch.
"""
