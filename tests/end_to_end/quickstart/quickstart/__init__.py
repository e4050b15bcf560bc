"""quickstart: a federation in the style of Flower's quickstarts."""
