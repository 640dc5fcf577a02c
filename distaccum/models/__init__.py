"""Models. They know nothing of accumulation and never return a mean."""
