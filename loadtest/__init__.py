"""Load tests whose latency figures can be believed, against any OpenAI-compatible server.

Speaks HTTP only: nothing here imports the engine or the server. `cli.app` is the command line,
`generator` makes the load, `summary` turns request records into figures, `report` draws them.
"""
