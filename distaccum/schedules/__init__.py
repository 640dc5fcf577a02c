"""In which order the micros of a window are computed."""
