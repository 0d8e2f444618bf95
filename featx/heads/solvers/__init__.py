"""Solvers of penalised linear heads: in the space of the rows, block by block, or on a device."""
