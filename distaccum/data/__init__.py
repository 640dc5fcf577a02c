"""Groups a loader's micro-batches into windows, and reads text and images as data sets."""
