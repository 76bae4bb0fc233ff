"""`python -m convserve.server` is the `convserve` command."""

from .cli import main

main()
