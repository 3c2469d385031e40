"""Training and evaluation of detectors. `import relops` does not import this package.

- cli: the commands of `python -m relops`, one module per command.
- config: the settings of a training run.
- engine: `train`, the training loop.
- data: data sets, and how their images become batches.
- detector: building a model by name, and saving and loading trained detectors.
- prediction: detections, drawings and proposals of a trained detector.
- evaluation: average precision.
- errors: the errors that a user can fix.
- checkpoint: files that hold the state of a run.
- distributed: the processes of a run.
- log: the log of a run, its losses and its times.
- optimization: optimizers, learning rate schedules and weight averages.
- plots: drawings of detections and training curves.
- signals: stopping a run on SIGINT and SIGTERM.
"""
