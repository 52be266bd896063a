"""``python -m resnetlab``."""

from resnetlab.cli import main

if __name__ == "__main__":
    main()
