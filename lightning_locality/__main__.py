"""``python -m lightning_locality``: the command line."""

from lightning_locality.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
