"""`python -m ramekin` is the command `ramekin`."""

from ramekin.cli import main

main()
