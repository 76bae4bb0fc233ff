"""schemathesis puts what /openapi.json allows, and what it forbids, on every route.

Breaks for: whoever generates a client from the schema; and for operators, if any input is a 5xx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from running import Served

CHECKS = (
    "not_a_server_error",
    "response_schema_conformance",
    "content_type_conformance",
    "status_code_conformance",
)


def test_no_server_error_and_no_violation_of_the_schema(
    tiny_server: Served, tool: Callable[..., str], run_tool: Callable[..., str]
) -> None:
    output = run_tool(
        [
            *(tool("schemathesis"), "run", f"{tiny_server.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", "30", "--seed", "1", "--request-timeout", "60"),
            *("--continue-on-failure", "--no-color"),
        ]
    )
    assert "Test cases:" in output
