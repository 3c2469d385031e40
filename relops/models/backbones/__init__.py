"""Networks whose maps detectors work on. `relops.models` exports those that users build by name."""
