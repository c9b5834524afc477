"""Unpacks the Python files of vLLM and vLLM-Ascend, as `bi-patch check` keeps them: `sources.py FOLDER`.

pip downloads both once (330 and 27 MB) into bi_patch's cache folder. The release is the newest that Ascend has.
"""

import sys
import zipfile
from pathlib import Path

from bi_patch.platforms.releases import BY_PLATFORM, PACKAGES
from bi_patch.settings import read
from bi_patch.tools.upstream.fetch import fetch

RELEASE = BY_PLATFORM["ascend"][-1]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for package in PACKAGES:
        with zipfile.ZipFile(fetch(RELEASE, read().cache, package)) as archive:
            archive.extractall(folder)
