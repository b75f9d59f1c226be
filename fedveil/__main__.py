"""``python -m fedveil``: the command line, for whoever's scripts are not on the path."""

from fedveil.cli.main import main

if __name__ == "__main__":
    main()
