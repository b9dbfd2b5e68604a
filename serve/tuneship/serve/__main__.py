"""`python -m tuneship.serve ATTEMPT`: the server of a run as a process of its own."""

from tuneship.core.stage import child_main
from tuneship.serve.stages import serve

if __name__ == "__main__":
    child_main({"serve": serve})
