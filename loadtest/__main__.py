"""`python -m convserve.loadtest`: the same commands as `convserve loadtest`."""

from .cli import app

app(prog_name="convserve loadtest")
