"""``keylock schema``: what a file of requests may say."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON Schema of a file of requests, which editors complete and check by."""
    from keylock_diffusers.requests_schema import schema

    print(json.dumps(schema(), indent=1))
