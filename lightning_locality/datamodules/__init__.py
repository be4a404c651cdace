"""Data modules that build tasks from image sets."""
