"""A Flower app whose server learns the sum of its clients' changes alone."""
