"""``python -m dagflow.cli``."""

from dagflow.cli import main

main()
