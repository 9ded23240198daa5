"""`python -m lamella` is the command `lamella`."""

from lamella.cli.main import main

if __name__ == "__main__":
    main()
