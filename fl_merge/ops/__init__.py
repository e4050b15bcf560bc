"""Pure functions on tensors: the formulas, each testable with a few numbers on paper."""
