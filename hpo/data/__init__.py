"""Examples: data sets found, verified, converted once and split; batches that stay on the device; augmentation."""
