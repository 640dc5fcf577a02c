"""Runs the console script `distaccum` as `python -m distaccum`."""

from distaccum.cli import main

if __name__ == "__main__":
    main()
