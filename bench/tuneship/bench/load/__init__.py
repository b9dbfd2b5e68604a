"""How fast: what is sent and when, the client that sends it, and the figures of what came back."""
