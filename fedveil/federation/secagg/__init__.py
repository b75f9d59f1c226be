"""Secure aggregation (SecAgg+): the server learns sums only."""
