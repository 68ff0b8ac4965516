"""``python -m pathfm`` is ``pathfm``."""

from pathfm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
