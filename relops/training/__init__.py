"""Training and evaluation of detectors. None of it is imported by `import relops`."""
