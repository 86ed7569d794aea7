"""`python -m pythia_jax` is `pythia-jax`, where no script is installed or not on the path."""

from pythia_jax.cli import main

if __name__ == "__main__":
    main(prog_name="pythia-jax")
