"""The commands of `python -m relops` that train and use detectors, a module each.

`add_parser` of a module adds its command to the parser, and what it sets as `run` carries the command out.
"""
