"""What the log says once, however often it is true."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Logs each message once."""
    logger.warning(message)
