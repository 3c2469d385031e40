"""The commands of `python -m relops`, one module per command.

The function `add_parser` of a module adds the command to the parser and sets `run`, the function that executes it.
"""
