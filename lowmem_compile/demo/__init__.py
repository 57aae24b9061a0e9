"""Real models and data, and the honest measuring of what training them keeps in memory.

Used by ``lowmem demo``, by the benchmarks and by the end-to-end tests. Nothing here needs the network.
"""
