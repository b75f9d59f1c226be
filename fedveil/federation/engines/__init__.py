"""Where a federation runs: worker processes, Flower's simulation, or deployed nodes."""
