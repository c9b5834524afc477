"""Lets the tests here import feature_configs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
