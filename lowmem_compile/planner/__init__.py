"""Memory over time: what is alive when."""
