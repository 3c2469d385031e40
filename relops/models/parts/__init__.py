"""What detectors are made of: anchors, proposals, heads on regions, set prediction, and their arithmetic of boxes."""
