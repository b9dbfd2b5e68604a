"""`python -m tuneship`."""

from tuneship.cli.app import main

if __name__ == "__main__":
    main()
