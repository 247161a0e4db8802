"""`python -m tokenenv.cli`."""

from tokenenv.cli import main

if __name__ == "__main__":
    main()
