"""The detectors, a file each. `relops.models` exports them; exported here, their functions would hide the files."""
