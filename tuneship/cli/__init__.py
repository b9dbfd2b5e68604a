"""The command line: verbs by import string, so that `--help` loads none of the libraries that they need."""
