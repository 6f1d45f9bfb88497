"""Benchmarks: the gateway, its peers and the limits of the machine, in one run (README.md)."""
