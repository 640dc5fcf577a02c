"""The program `distaccum`: configuration, task, training, validation, resume, and the commands."""
