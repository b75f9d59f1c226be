"""A Flower app with a strategy of its own, under which nothing that was learnt is sent."""
