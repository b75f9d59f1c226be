"""A Flower app whose clients return sums over their images, once."""
