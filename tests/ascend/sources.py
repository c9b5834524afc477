"""Unpacks the Python files of vLLM 0.23.0 and vLLM-Ascend 0.23.0, as `bi-patch check` keeps them:
`sources.py FOLDER`.

Both are downloaded with pip once (330 and 27 MB) into the cache folder of bi_patch.
"""

import sys
import zipfile
from pathlib import Path

from bi_patch.platforms.releases import PACKAGES
from bi_patch.settings import read
from bi_patch.tools.upstream.fetch import fetch

RELEASE = "0.23.0"

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for package in PACKAGES:
        with zipfile.ZipFile(fetch(RELEASE, read().cache, package)) as archive:
            archive.extractall(folder)
