"""The same small project on disk as for the configuration tests."""

from tests.config.conftest import _plain_environment, config, project

__all__ = ["_plain_environment", "config", "project"]
