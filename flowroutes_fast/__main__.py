"""``python -m flowroutes_fast``: the command line."""

from flowroutes_fast.cli import main

if __name__ == "__main__":
    main()
