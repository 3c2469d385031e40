"""The building blocks of the detectors: anchors, proposals, region heads, set prediction and box arithmetic."""
