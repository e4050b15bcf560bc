"""toy: data and model."""

import numpy as np

TRUE_WEIGHTS = np.array([1.0, -2.0, 0.5, 3.0])


def load_data(partition_id: int, num_points: int = 32):
    """The private points of one client: inputs and noisy targets."""
    rng = np.random.default_rng(partition_id)
    x = rng.normal(size=(num_points, TRUE_WEIGHTS.size))
    y = x @ TRUE_WEIGHTS + 0.1 * rng.normal(size=num_points)
    return x, y


def new_model():
    return {"weights": np.zeros(TRUE_WEIGHTS.size), "bias": np.zeros(1)}


def train(model, x, y, learning_rate: float, steps: int):
    """Gradient steps on random halves of the points; the mean squared error afterwards."""
    for _ in range(steps):
        half = np.random.permutation(len(y))[: len(y) // 2]
        error = x[half] @ model["weights"] + model["bias"] - y[half]
        model["weights"] -= learning_rate * 2 * x[half].T @ error / len(half)
        model["bias"] -= learning_rate * 2 * error.mean(keepdims=True)
    return test(model, x, y)


def test(model, x, y) -> float:
    """The mean squared error."""
    return float(np.mean((x @ model["weights"] + model["bias"] - y) ** 2))
