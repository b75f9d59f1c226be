"""A federation over several hosts: what its operator needs around Flower's own programs."""
