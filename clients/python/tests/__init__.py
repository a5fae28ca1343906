"""Tests of the client. They use the package of this checkout, or with NKV_INSTALLED=1 the one that is installed."""

import os
import sys

if not os.environ.get("NKV_INSTALLED"):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src"))
