"""The command ``rank``: what a trained model's ranks and interaction distances are, measured from its checkpoint."""
