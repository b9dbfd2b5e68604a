"""The server: SGLang as a child process on loopback, and the door in front of it.

commands.serve -> catalog (what is served, checked) -> launch (flags) -> engine (the child) -> gateway (the door)
"""
