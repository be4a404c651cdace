"""The figure command: figures and tables of finished runs."""
