"""Training and evaluation of detectors. `import relops` does not import this package.

- cli: the commands of `python -m relops`, one module per command.
- config: the settings of a training run.
- engine: `train`, the training loop.
- data: data sets, and the conversion of their images to batches.
- detector: building models by name, and saving and loading trained detectors.
- prediction: detecting objects with a trained detector, drawing them, and computing proposals.
- evaluation: average precision.
- errors: exception classes for errors that the user can fix.
- checkpoint: files that hold the state of a run.
- distributed: training with several processes.
- log: writing the log of a run, and collecting its losses and times.
- optimization: optimizers, learning rate schedules and weight averages.
- plots: drawings of detections, and plots of training curves.
- signals: stopping a run on SIGINT or SIGTERM.
"""
