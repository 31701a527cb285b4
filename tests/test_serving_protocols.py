"""The Open Inference Protocol, a real process with SIGTERM, and the documents of the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from fieldguide.serving.app import build_app
from fieldguide.serving.models import open_models
from fieldguide.serving.server import Server, load_server, open_socket
from fieldguide.serving.settings import ServerSettings
from test_serving import GOLDEN, LOCAL, PHOTOS, ROW, TABLE, assert_near

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models():
    names = (TABLE, PHOTOS, "v2-instance-segmentation", "v1-image-generation")
    return open_models([str(GOLDEN / name) for name in names], ServerSettings())


@pytest.fixture(scope="module")
def client(models):
    with TestClient(build_app(models, ServerSettings()), base_url=LOCAL) as opened:
        yield opened


def test_v2_describes_server_and_models(client):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/ready").status_code == client.get(f"/v2/models/{TABLE}/ready").status_code == 200
    found = client.get(f"/v2/models/{TABLE}/versions/1").json()
    assert found["inputs"][:2] == [
        {"name": "size", "datatype": "FP64", "shape": [-1]},
        {"name": "colour", "datatype": "BYTES", "shape": [-1]},
    ]
    assert {"name": "probability", "datatype": "FP64", "shape": [-1]} in found["outputs"]
    error = client.get("/v2/models/none").json()["error"]
    assert isinstance(error, str) and "no model 'none'" in error
    assert client.get(f"/v2/models/{TABLE}/versions/2").status_code == 404


def tensors(rows) -> list[dict]:
    kinds = {"size": "FP64", "gift": "BOOL"}
    return [
        {"name": name, "shape": [len(rows), 1], "datatype": kinds.get(name, "BYTES"), "data": [[row[name]] for row in rows]}
        for name in rows[0]
    ]


def test_v2_infers_from_json(client):
    rows = [ROW, ROW | {"size": 9.0}]
    answer = client.post(f"/v2/models/{TABLE}/infer", json={"id": "7", "inputs": tensors(rows)}).json()
    wanted = client.post("/v1/predict", json={"model": TABLE, "rows": rows}).json()["predictions"]
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert answer["id"] == "7" and outputs["label"]["data"] == [record["label"] for record in wanted]
    assert_near([json.loads(text) for text in outputs["probabilities"]["data"]], [record["probabilities"] for record in wanted])
    one = client.post(f"/v2/models/{TABLE}/infer", json={"inputs": tensors(rows), "outputs": [{"name": "label"}]}).json()
    assert [output["name"] for output in one["outputs"]] == ["label"]


def test_v2_infers_from_bytes(client):
    """Files and numbers follow the JSON; answers come back in the same way."""
    content = (GOLDEN / PHOTOS / "digit-0.png").read_bytes()
    tail = b"".join(struct.pack("<I", len(content)) + content for _ in range(2))
    head = {
        "inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}],
        "outputs": [
            {"name": "label", "parameters": {"binary_data": True}},
            {"name": "probability", "parameters": {"binary_data": True}},
        ],
    }
    text = json.dumps(head).encode()
    response = client.post(
        f"/v2/models/{PHOTOS}/infer", content=text + tail, headers={"Inference-Header-Content-Length": str(len(text))}
    )
    size = int(response.headers["Inference-Header-Content-Length"])
    answer, binary = json.loads(response.content[:size]), response.content[size:]
    assert binary[:5] == struct.pack("<I", 1) + b"0"
    numbers = np.frombuffer(binary[10:], "<f8")
    assert len(numbers) == 2 and answer["outputs"][1]["parameters"]["binary_data_size"] == 16
    assert numbers[0] == pytest.approx(0.21398, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"inputs": []}, "no rows"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP64", "data": [1]}]}, "no input 'x'"),
        ({"inputs": [{"name": "size", "shape": [2], "datatype": "FP64", "data": [1]}]}, "has 2 elements, but there are 1"),
        ({"inputs": [{"name": "size", "shape": [-1], "datatype": "FP64", "data": [1]}]}, "negative"),
        ({"inputs": [{"name": "size", "shape": [1], "datatype": "FP65", "data": [1]}]}, "FP65"),
        (
            {"inputs": [{"name": "size", "shape": [1], "datatype": "FP64", "parameters": {"binary_data_size": 8}}]},
            "not in the body",
        ),
        ({"inputs": tensors([ROW]), "parameters": {"x": 1}}, "unknown field 'x'"),
        ({"inputs": tensors([ROW]), "outputs": [{"name": "x"}]}, "no output 'x'"),
        ({"inputs": [*tensors([ROW])[:1], *tensors([ROW, ROW])[1:]]}, "one is needed for each row"),
    ],
)
def test_v2_errors_are_texts(client, body, text):
    response = client.post(f"/v2/models/{TABLE}/infer", json=body)
    assert response.status_code in (400, 422) and text in response.json()["error"], response.text


def test_tritonclient(models):
    """Triton's client, unmodified, which sends and receives binary tensors."""
    triton = pytest.importorskip("tritonclient.http")
    from live import live_server

    with live_server(models, ServerSettings()) as address:
        client = triton.InferenceServerClient(address.removeprefix("http://"))
        try:
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(TABLE)
            names = {entry["name"]: entry["datatype"] for entry in client.get_model_metadata(TABLE)["inputs"]}
            inputs = []
            for name, kind in names.items():
                values = np.array([ROW[name]] * 3, dtype=np.float64 if kind == "FP64" else object)
                if kind != "FP64":
                    values = np.array([str(ROW[name]).lower().encode()] * 3, dtype=object)
                tensor = triton.InferInput(name, [3], kind)
                tensor.set_data_from_numpy(values)
                inputs.append(tensor)
            result = client.infer(TABLE, inputs, outputs=[triton.InferRequestedOutput("probability")])
            assert result.as_numpy("probability").shape == (3,) and result.as_numpy("probability").dtype == np.float64
            whole = client.infer(TABLE, inputs)
            assert whole.as_numpy("label").shape == (3,)
            with pytest.raises(Exception, match="no rows"):
                client.infer(TABLE, [])
        finally:
            client.close()


# A process


def start_server(*arguments: str) -> tuple[subprocess.Popen, str]:
    """Start `fieldguide serve` and return the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldguide", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"Serving on (http://\S+)\.", line):
            return process, found.group(1)
    assert process.stderr is not None
    pytest.fail(process.stderr.read())


def test_the_port_listens_when_its_address_is_printed(monkeypatch, capsys):
    """A client that waits for the address may connect at once."""

    def connect(self, sockets):
        assert "Serving on http://127.0.0.1:" in capsys.readouterr().out
        socket.create_connection(sockets[0].getsockname(), timeout=5).close()

    monkeypatch.setattr(Server, "run", connect)
    load_server([str(GOLDEN / "v1-tabular-classification")], ServerSettings(port=0)).serve_forever()


@pytest.mark.slow
def test_a_process_finishes_what_it_has_begun():
    """After SIGTERM, running and queued requests are answered, new ones are refused, and the process ends with 0."""
    process, address = start_server(str(GOLDEN / "v1-image-generation"))
    body = {"rows": ["1"], "options": {"count": 32, "steps": 30, "seed": 1}}
    answers: list = []

    def ask():
        answers.append(httpx.post(f"{address}/v1/predict", json=body, timeout=60))

    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(500):
            if "requests_in_progress 5" in httpx.get(f"{address}/metrics").text:  # that of the metrics is one
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health/ready")
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len({answer.text for answer in answers}) == 1  # the same seed
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_answers_are_sent_at_once():
    """asyncio turns off Nagle's algorithm only for sockets whose protocol is stated; it would delay each answer by 40 ms."""
    opened = open_socket("127.0.0.1", 0)
    with opened:
        assert opened.proto == socket.IPPROTO_TCP


def test_wrong_arguments_end_with_one_line():
    for arguments, text in (
        (["no-such-run"], "does not exist"),
        ([str(GOLDEN / TABLE), "--host", "0.0.0.0"], "FIELDGUIDE_API_KEY"),
        ([str(GOLDEN / TABLE), "--max-batch", "0"], "max-batch=0 must be at least 1"),
    ):
        ended = subprocess.run([sys.executable, "-m", "fieldguide", "serve", *arguments], capture_output=True, text=True)
        assert ended.returncode == 1 and text in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_the_page_needs_nothing_from_elsewhere(client):
    """All files are there, name no other host, and have no code in the page, which the policy forbids."""
    page = client.get("/")
    assert (
        page.headers["Content-Type"].startswith("text/html") and "default-src 'self'" in page.headers["Content-Security-Policy"]
    )
    assert "<script>" not in page.text and " on" not in re.sub(r">[^<]*<", "><", page.text).replace(" one", "")
    found = set(re.findall(r'"(/page/[^"]+)"', page.text))
    for name in ("form.js", "answer.js", "recording.js"):
        found |= set(re.findall(r'"(/page/[^"]+)"', client.get(f"/page/{name}").text))
    assert {path.rpartition("/")[2] for path in found} >= {"style.css", "form.js", "answer.js", "recording.js", "recorder.js"}
    for path in found:
        response = client.get(path)
        assert response.status_code == 200
        assert set(re.findall(r"https?://[\w.]+", response.text)) <= {"http://www.w3.org"}, path
    assert client.get("/page/..%2Fapp.py").status_code == client.get("/page/app.py").status_code == 404


def test_run_lengths_of_masks_are_decoded_by_the_page(tmp_path):
    """The page decodes masks as pycocotools does."""
    from pycocotools import mask

    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    rng = np.random.default_rng(0)
    wanted, coded = [], []
    for _ in range(20):
        pixels = np.asfortranarray(rng.random((int(rng.integers(1, 90)), int(rng.integers(1, 90)))) < rng.random(), np.uint8)
        coded.append(mask.encode(pixels)["counts"].decode())
        flat = np.concatenate([[0], pixels.ravel("F"), [2]])
        runs = np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=0).tolist()
        wanted.append(runs)
    code = (REPOSITORY / "src/fieldguide/serving/page/answer.js").read_text()
    function = re.search(r"export (function decodeRuns.*?\n}\n)", code, re.DOTALL).group(1)
    script = tmp_path / "runs.js"
    script.write_text(f"{function}\nconsole.log(JSON.stringify({json.dumps(coded)}.map(decodeRuns)))")
    found = json.loads(subprocess.run([node, str(script)], capture_output=True, text=True, check=True).stdout)
    strip = lambda runs: [run for run in runs if run]
    assert list(map(strip, found)) == list(map(strip, wanted))


def test_deployment_files_use_options_that_exist():
    from test_cli import VERBS

    for name in ("Dockerfile", "fieldguide.service"):
        text = (REPOSITORY / "deploy" / name).read_text()
        command = next(line for line in text.splitlines() if line.startswith(("ENTRYPOINT", "ExecStart")))
        assert "serve" in command and set(re.findall(r"--[a-z-]+", command)) <= VERBS["serve"]
