"""What knows LLaMA-Factory: its loading of data, its launching, its trainer's place.

UnsupportedError where LLaMA-Factory is not installed.
"""

from importlib.util import find_spec

from dataflex.errors import UnsupportedError
from dataflex.version import install

if find_spec("llamafactory") is None:
    raise UnsupportedError(f"LLaMA-Factory is not installed: {install('llamafactory')}")
