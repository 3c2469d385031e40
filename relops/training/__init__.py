"""Training and evaluation of detectors. `import relops` imports none of it.

- cli: the commands of `python -m relops`, a module each.
- config: the settings of a run.
- engine: `train`, the training loop.
- data: data sets, and the way from them to batches.
- detector: a model by name, and all that it takes to use one that is trained.
- prediction: what a detector finds in images.
- evaluation: average precision.
- errors: the errors that a user can put right.
- checkpoint, distributed, log, optimization, plots: what their names say.
"""
