"""`python -m emtool`, the same as the console script."""

from emtool.cli.app import main

if __name__ == "__main__":
    main()
