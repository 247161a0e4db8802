"""Grids of environments, reward designs, algorithms and seeds, run in parallel and kept cell by
cell."""

from tokenenv.bench.grid import Grid
from tokenenv.bench.run import Results, bench

__all__ = ["Grid", "Results", "bench"]
