"""Ask a server thousands of odd questions, made from its own description; none may be answered with a 5xx.

    pronk serve --port 8000 --max-model-len 256
    pip install schemathesis
    python tests/clients/fuzz.py http://127.0.0.1:8000 --examples 300

The description that the questions are made from is narrowed: the model is always one that is served, and the stored
responses that are asked for are there. It is used twice, the second time without fields that are refused unless another
one has a certain value, or few questions would get further than these. A context of 256 tokens keeps answers short.

Of what schemathesis can check, one thing is not checked: that all that fits the description is accepted, for some of
what a request must keep (a schema that can be enforced, a prompt that fits) no description says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

# Checks are named here and not on the command line, which would turn on again what is turned off for one operation.
# A body that is too long is refused, too. The path of the last rule is also that of a response with this id.
CONFIG = """
[checks]
enabled = false
not_a_server_error.enabled = true
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_headers_conformance.enabled = true
response_schema_conformance.enabled = true
unsupported_method.enabled = true

[checks.negative_data_rejection]
enabled = true
expected-statuses = [400, 401, 404, 405, 413, 429]

[[operations]]
include-path = "/v1/responses/input_tokens"
checks.unsupported_method.enabled = false
"""
DEPENDENT = ("top_logprobs", "stream_options", "length_penalty", "use_beam_search", "prompt_logprobs")
NUM_STORED = 100


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def store_responses(url: str, model: str) -> list[str]:
    """-> the ids of responses that there are now; every other one can be cancelled."""
    question = {"model": model, "input": "Hello", "max_output_tokens": 16}
    asked = [{**question, "background": place % 2 == 0} for place in range(NUM_STORED)]
    return [post(f"{url}/v1/responses", body)["id"] for body in asked]


def bodies(operation: dict[str, Any]) -> list[dict[str, Any]]:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return [schema, *schema.get("anyOf", [])]


def narrow(document: dict[str, Any], models: list[str], stored: list[str], *, without: tuple[str, ...]) -> None:
    """Change the description into one of requests for these models and stored responses, without these fields."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for schema in bodies(operation):
                fields = schema.get("properties", {})
                for name in without:
                    fields.pop(name, None)
                for name, known in (("model", models), ("previous_response_id", stored)):
                    field = fields.get(name, {})
                    for kind in [field, *field.get("anyOf", [])]:
                        if kind.get("type") == "string":
                            kind["enum"] = known
            for parameter in operation.get("parameters", []):
                if parameter["name"] in ("model_id", "response_id"):
                    parameter["schema"]["enum"] = models if parameter["name"] == "model_id" else stored


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--examples", type=int, default=200, help="of each operation, in each phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schemathesis", default=str(Path(sys.executable).parent / "schemathesis"))
    asked, more = parser.parse_known_args()
    models = [model["id"] for model in get(f"{asked.url}/v1/models")["data"]]
    failed = False
    for without in ((), DEPENDENT):
        document = get(f"{asked.url}/openapi.json")
        narrow(document, models, store_responses(asked.url, models[0]), without=without)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "schemathesis.toml").write_text(CONFIG)
            (Path(folder) / "openapi.json").write_text(json.dumps(document))
            command = [asked.schemathesis, "run", "openapi.json", "--url", asked.url, "--mode", "all"]
            command += ["--max-examples", str(asked.examples), "--seed", str(asked.seed)]
            command += ["--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all", *more]
            failed |= subprocess.run(command, cwd=folder, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
