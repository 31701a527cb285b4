"""The server under load, under random requests, and called by clients in JavaScript. Each is skipped where its tool is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fieldguide
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.serving.models import open_models
from fieldguide.serving.settings import ServerSettings
from live import live_server
from test_serving import GOLDEN, RUNS
from test_serving_openai import folder  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CLIENTS = ("openai@6.49.0", "ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92")
EXAMPLES = 100  # random requests for each operation
# Runs all of whose valid requests are answered; others reject what no schema says, such as a text without a gap.
TOTAL = ("v2-tabular-classification", "v2-tabular-regression", "v2-text-classification", "v1-token-classification")


def test_disconnects_and_terminations_lose_no_answer():
    script = ROOT / "benchmarks" / "serving.py"
    command = [
        sys.executable,
        str(script),
        str(GOLDEN / "v2-tabular-regression"),
        "--disconnects",
        "1000",
        "--terminations",
        "5",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"1,000 disconnects: [\d,]+ answers right, 0 wrong", said), said
    assert re.search(r"5 x SIGTERM: [\d,]+ answers right, 0 wrong, 0 lost; 0 bad exits", said), said
    assert "errors" not in said


@pytest.mark.parametrize("name", RUNS)
def test_random_requests(name):
    """schemathesis makes valid and invalid requests from the document of the server: no 5xx, and no answer against its schema."""
    pytest.importorskip("schemathesis")
    models = open_models([str(GOLDEN / name)], ServerSettings())
    generates = models[0].signature.loop is not None
    with live_server(models, ServerSettings(timeout=8)) as address:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", "--checks", "all"]
        if name not in TOTAL:
            command += ["--exclude-checks", "positive_data_acceptance"]
        if generates:  # 504 is right for what takes longer than the server waits
            command += ["--exclude-checks", "positive_data_acceptance,not_a_server_error"]
        command += ["--max-examples", str(20 if generates else EXAMPLES), "--seed", "1", "--request-timeout", "60"]
        ended = subprocess.run(command, capture_output=True, text=True)
        metrics = __import__("httpx").get(f"{address}/metrics").text
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert 'status="500"' not in metrics


def test_clients_in_javascript(folder, tmp_path):  # noqa: F811
    """The client of OpenAI for Node and the AI SDK of Vercel, unmodified."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node is not installed")
    shutil.copy(ROOT / "tests" / "clients" / "clients.mjs", tmp_path)
    (tmp_path / "package.json").write_text('{"private": true}')
    installed = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", *CLIENTS], cwd=tmp_path, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"the clients cannot be installed: {installed.stderr[-200:]}")
    models = open_models([f"chat={folder}", f"embed={GOLDEN / 'v1-fill-mask'}"], ServerSettings())
    with live_server(models, ServerSettings()) as address:
        command = [node, "clients.mjs", address]
        found = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    question = [{"role": "user", "content": "who sat on the mat?"}]
    wanted = TextGenerator.load(folder).generate([question], max_new_tokens=12, temperature=0.0)[0]
    vector = fieldguide.open_run(GOLDEN / "v1-fill-mask").embed(["rain fell"])[0].tolist()
    assert found["models"] == ["chat", "embed"] and found["error"] == [404, "model_not_found"]
    assert [found[name] for name in ("chat", "streamed", "sdk", "sdkStreamed")] == [wanted] * 4
    assert found["usage"] == found["streamedUsage"] == found["sdkUsage"]
    assert found["vector"] == pytest.approx(vector, abs=1e-6) == found["sdkVector"]
