"""Figures: each kind is a function of ``read_runs(...)`` that returns a figure and the numbers in it."""

import lazy_loader

# on first use: seaborn takes most of a second to import
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["accuracy", "depth", "observations", "rank", "xy"],
        "recovery": ["components", "curve_summary", "dynamics", "norm", "value"],
        "training": ["accuracy_curves", "example_inputs", "training_curves"],
    },
)
