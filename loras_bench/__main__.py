"""`python -m loras_bench`, also under `accelerate launch -m`."""

from loras_bench.cli import main

if __name__ == "__main__":
    main()
