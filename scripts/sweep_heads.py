#!/usr/bin/env python3
"""Compare heads on the cached embeddings of a store: the same as ``featx sweep``.

python scripts/sweep_heads.py photos.featx --shots 5,20
"""

import sys

from featx.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()
