#!/usr/bin/env python3
"""Embed a folder of photos into a store: the same as ``featx extract``.

python scripts/extract_features.py photos --out photos.featx
"""

import sys

from featx.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "extract")
    main()
