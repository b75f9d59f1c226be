"""A Flower app whose clients receive copies below a cap."""
