"""Train, evaluate and use the residual networks of He, Zhang, Ren and Sun (2015)."""

__version__ = "0.1.0"
