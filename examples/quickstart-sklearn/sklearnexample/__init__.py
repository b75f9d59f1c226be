"""A Flower app of scikit-learn whose clients receive copies below a cap."""
