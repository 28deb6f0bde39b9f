"""``python -m hapo_async`` is the command ``hapo-async``."""

from hapo_async.cli import main

if __name__ == "__main__":
    main()
