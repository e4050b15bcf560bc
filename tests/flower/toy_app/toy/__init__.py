"""toy: A Flower app."""
