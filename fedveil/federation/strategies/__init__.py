"""What a server does with the answers of a round, as Flower strategies."""
