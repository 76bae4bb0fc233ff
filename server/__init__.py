"""HTTP in, server-sent events out: everything between a socket and the engine's client.

Sees token ids, never a tensor; imports of the engine only what it publishes for that.
"""
