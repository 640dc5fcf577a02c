"""Which samples make which step, and what is divided by what. Knows neither ranks nor torch's private names."""
