"""`python -m distaccum` is the console script `distaccum`."""

from distaccum.cli import main

if __name__ == "__main__":
    main()
