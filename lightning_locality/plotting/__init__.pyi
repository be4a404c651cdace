from .comparison import accuracy, depth, observations, rank, xy
from .recovery import components, dynamics, growth, norm, value
from .training import accuracy_curves, example_inputs, training_curves

__all__ = [
    "accuracy",
    "accuracy_curves",
    "components",
    "depth",
    "dynamics",
    "example_inputs",
    "growth",
    "norm",
    "observations",
    "rank",
    "training_curves",
    "value",
    "xy",
]
