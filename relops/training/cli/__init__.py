"""The commands of `python -m relops`, one module per command.

The function `add_parser` of each module adds the module's command to the parser. It also sets the parser's default
`run`, which is the function that executes the command.
"""
