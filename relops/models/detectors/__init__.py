"""The detectors, one file each.

`relops.models` exports the functions that build them. If this package exported these functions, they would hide the
modules of the same names.
"""
