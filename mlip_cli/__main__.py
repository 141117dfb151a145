"""`python -m mlip_cli`, the form that torchrun starts."""

from mlip_cli.cli import main

if __name__ == "__main__":
    main()
