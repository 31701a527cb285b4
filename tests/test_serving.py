"""The server: the records of `predict`, batches that change no answer, limits, security, and errors with a place and a remedy."""

from __future__ import annotations

import base64
import gc
import json
import shutil
import struct
import sys
import threading
import time
import weakref
import zlib
from io import BytesIO
from pathlib import Path

import polars as pl
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from starlette.testclient import TestClient

import fieldguide
from fieldguide.core.errors import SettingsError
from fieldguide.core.options import PREDICT_ALIASES
from fieldguide.serving import extras, server
from fieldguide.serving.app import build_app
from fieldguide.serving.media_files import TYPES
from fieldguide.serving.models import LoadedModel, open_models
from fieldguide.serving.settings import ServerSettings
from fieldguide.serving.worker import Job, Worker

GOLDEN = Path(__file__).parent / "golden"
RUNS = sorted(p.parent.name for p in GOLDEN.glob("v*/run.json"))
LOCAL = "http://127.0.0.1"
TABLE, PHOTOS, TEXTS = "v2-tabular-classification", "v2-image-classification", "v2-text-classification"
ROW = {"size": 3.5, "colour": "red", "day": "2024-03-04", "gift": True}


@pytest.fixture(scope="module")
def models():
    return {model.name: model for model in open_models([str(GOLDEN / name) for name in RUNS], ServerSettings())}


@pytest.fixture(scope="module")
def client(models):
    """A server of all golden runs."""
    with TestClient(build_app(list(models.values()), ServerSettings()), base_url=LOCAL) as opened:
        yield opened


@pytest.fixture(scope="module")
def table(models):
    """A server of one run, so that requests need not name it."""
    with TestClient(build_app([models[TABLE]], ServerSettings()), base_url=LOCAL) as opened:
        yield opened


def data_url(path: Path) -> str:
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def png_url(side=8) -> str:
    file = BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def bomb_url(side: int) -> str:
    """Return a small PNG whose header claims many pixels."""
    content = bytearray(base64.b64decode(png_url().partition(",")[2]))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def make_rows(model: LoadedModel) -> tuple[list, dict]:
    """Return the inputs of a golden run as rows of a request, and its options."""
    folder, signature = GOLDEN / model.name, model.signature
    expected = json.loads((folder / "expected.json").read_text())
    known = {option.name for option in signature.options}
    asked = expected.get("asked", {})
    options = {key if key in known else PREDICT_ALIASES[key]: value for key, value in asked.items()}
    inputs, fields = expected["inputs"], {field.name: field for field in signature.inputs}
    first = signature.inputs[0]
    if inputs and inputs[0].endswith(".csv"):
        numbers = [name for name, field in fields.items() if field.kind == "number"]
        frame = pl.read_csv(folder / inputs[0], infer_schema_length=0).select([n for n in fields if n])
        frame = frame.with_columns(pl.col(numbers).cast(pl.Float64))
        rows = [dict(row) for row in frame.iter_rows(named=True)]
        for row in rows:
            for name, value in row.items():
                if fields[name].kind == "image":
                    row[name] = data_url(folder / value)
        return rows, options
    if signature.row_form == "value":
        return inputs, options
    if inputs and (folder / inputs[0]).exists():
        return [{first.name: data_url(folder / name)} for name in inputs], options
    return [{first.name: text.split() if first.kind == "list" else text} for text in inputs], options


def post(client, name, rows, options=None):
    return client.post("/v1/predict", json={"model": name, "rows": rows, "options": options or {}})


def assert_near(found, wanted, tolerance=1e-6):
    """Compare records: numbers within a relative and absolute tolerance, everything else exactly."""
    if isinstance(wanted, dict) and "base64" in wanted and "media" in wanted:
        return  # pixels may differ by rounding on another machine
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_near(found[key], value, tolerance)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert_near(one, other, tolerance)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    else:
        assert found == wanted


# Answers


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_those_of_predict(client, models, name):
    rows, options = make_rows(models[name])
    response = post(client, name, rows, options)
    assert response.status_code == 200, response.text
    answer = response.json()
    expected = json.loads((GOLDEN / name / "expected.json").read_text())["answers"]
    records = [{key: value for key, value in record.items() if key != "input"} for record in answer["predictions"]]
    records = [{key: record[key] for key in wanted} for record, wanted in zip(records, expected, strict=True)]
    assert_near(records, expected, 1e-5)  # golden records lack drawings over the input
    validator = Draft202012Validator(models[name].signature.output_schema())
    for record in answer["predictions"]:
        validator.validate(record)
    schema = client.get("/openapi.json", params={"model": name}).json()
    row_schema = schema["components"]["schemas"][f"{name}.Row"]
    for row in rows:
        if isinstance(row, dict):
            Draft202012Validator(row_schema).validate(row)


@pytest.mark.parametrize("name", RUNS)
def test_company_changes_no_answer(models, name):
    """Requests that are computed together get the records that they get alone, up to rounding of float32."""
    model = models[name]
    rows, options = make_rows(model)
    if not model.can_join:
        pytest.skip("computed alone")
    parts = [rows[:1], rows, rows[-1:], rows[:2]]
    alone = [model.compute_alone(model.read_rows(decode(model, part), options)) for part in parts]
    requests = [model.read_rows(decode(model, part), options) for part in parts]
    together = model.compute_together(requests)
    for request in requests:
        request.folder.remove()
    if any(answer.notes or answer.problems for answer in alone):
        assert together is None
        return
    assert together is not None
    for one, other in zip(together, alone):
        assert_near(one.records, other.records)


def decode(model, rows):
    from fieldguide.serving.json_values import convert_value

    return convert_value(rows, list[model.reader.kind])


def test_which_runs_share_batches(models):
    """Rows that are examples of their own do; generators, series, recommendations and images of any size do not."""
    shared = {name.partition("-")[2] for name, model in models.items() if model.can_join}
    assert shared >= {"image-classification", "tabular-regression", "text-classification", "object-detection", "fill-mask"}
    assert not shared & {
        "anomaly-detection",  # in series: the steps before count
        "image-generation",
        "image-segmentation",
        "recommendation",
        "text-generation",
        "time-series-classification",
        "time-series-forecasting",
    }


def test_steps_of_series_are_no_rows_of_their_own(models):
    """Records come in the order of series and time, so they are not named by the rows of the request."""
    signature = models["v2-anomaly-detection"].signature
    assert signature.record_for == "step" and {field.role for field in signature.inputs} >= {"series", "time"}


def test_a_row_with_a_note_is_computed_alone(models):
    """A note belongs to the request of its row; the others get none."""
    model = models["v1-click-prediction"]
    rows, _ = make_rows(model)
    strange = dict(rows[0], topic="alchemy")
    requests = [model.read_rows(decode(model, [row]), {}) for row in (rows[0], strange, rows[0])]
    answers = model.compute([model.make_job(request) for request in requests])
    assert not answers[0].problems and not answers[2].problems and not answers[0].notes
    assert answers[1].problems[0]["column"] == "topic" and answers[1].notes


def test_uploads_and_csv(client, table):
    folder = GOLDEN / PHOTOS
    files = [("image", (f"digit-{i}.png", (folder / f"digit-{i}.png").read_bytes(), "image/png")) for i in range(2)]
    answer = client.post("/v1/predict", data={"model": PHOTOS}, files=files).json()
    assert [record["input"] for record in answer["predictions"]] == ["digit-0.png", "digit-1.png"]
    one = client.post("/v1/predict", data={"model": PHOTOS}, files={"file": ("x/../a.png", files[0][1][1])}).json()
    assert one["predictions"][0]["input"] == "a.png"
    assert_near(one["predictions"][0]["probabilities"], answer["predictions"][0]["probabilities"])
    content = (GOLDEN / TABLE / "inputs.csv").read_bytes()
    answer = table.post("/v1/predict", content=content, headers={"Content-Type": "text/csv; charset=utf-8"}).json()
    assert answer["predictions"][0]["input"] == "rows.csv:2"
    assert (
        table.post("/v1/predict", data={"size": "3.5", "colour": "red", "day": "2024-03-04", "gift": "true"}).status_code == 415
    )
    form = {name: (None, str(value)) for name, value in ROW.items()}
    assert_near(
        table.post("/v1/predict", files=form).json()["predictions"][0]["probabilities"],
        table.post("/v1/predict", json={"rows": [ROW]}).json()["predictions"][0]["probabilities"],
    )


# Errors


BROKEN = {
    "no JSON": (b"{", 400, "is not JSON"),
    "NaN": (b'{"rows":[{"size":NaN}]}', 400, "NaN"),
    "UTF-8": (b'{"rows":[{"colour":"\xff"}]}', 400, "UTF-8"),
    "deep": (b'{"rows":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "nested too deeply"),
    "infinite": (b'{"rows":[{"size":1e999,"colour":"red","day":"2024-01-01","gift":true}]}', 422, "out of range"),
    "huge": (b'{"rows":[{"size":' + b"9" * 400 + b',"colour":"red","day":"2024-01-01","gift":true}]}', 422, "out of range"),
    "text for a number": (json.dumps({"rows": [ROW | {"size": "3"}]}).encode(), 422, "a number or null, got a text"),
    "missing column": (json.dumps({"rows": [{"size": 3}]}).encode(), 422, "missing required field 'colour' at rows[0]"),
    "unknown column": (json.dumps({"rows": [ROW | {"x": 3}]}).encode(), 422, "unknown field 'x'"),
    "unknown option": (json.dumps({"rows": [ROW], "options": {"x": 3}}).encode(), 422, "unknown field 'x' at options"),
    "unknown key": (json.dumps({"row": ROW}).encode(), 422, "unknown field 'row'"),
    "no rows": (b"{}", 422, "no rows"),
    "empty": (b"", 400, "not JSON"),
    "a list": (b"[]", 422, "expected an object"),
    "rows of texts": (b'{"rows":["a"]}', 422, "rows[0]"),
    "unknown model": (b'{"model":"v2","rows":[]}', 404, "no model 'v2'"),
    "many rows": (json.dumps({"rows": [ROW] * 10_001}).encode(), 422, "10,001 rows"),
    "long": (json.dumps({"rows": [ROW | {"colour": "x" * 2_000_000}]}).encode(), 413, "characters"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests_name_problem_and_place(table, name):
    content, status, text = BROKEN[name]
    response = table.post("/v1/predict", content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status and text in error["message"], response.text
    assert error["type"] == "invalid_request_error" and error["code"]


def test_paths_addresses_and_bombs_are_rejected(client, monkeypatch, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8)).save(secret)
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    for value in (str(secret), f"file://{secret}", "http://127.0.0.1:1/a.png", "../secret.png", "/etc/passwd", "hf:a/b", ""):
        error = post(client, PHOTOS, [{"image": value}]).json()["error"]
        assert error["code"] == "not_a_data_url" and error["param"] == "rows[0].image" and "data:" in error["remedy"]
    for name, field in (
        (TEXTS, "text"),
        ("v1-text-generation", "text"),
        ("v1-fill-mask", "text"),
        ("v1-translation", "english"),
    ):
        assert post(client, name, [{field: str(secret)}]).status_code in (200, 422)
    assert post(client, "v1-recommendation", [{"user": str(secret), "item": str(secret), "time": None}]).status_code in (
        200,
        422,
    )
    csv = f"text\n{secret}\n".encode()
    assert (
        client.post("/v1/predict", params={"model": TEXTS}, content=csv, headers={"Content-Type": "text/csv"}).status_code
        == 200
    )
    assert not [path for path in opened if "secret" in path or "passwd" in path]

    assert post(client, PHOTOS, [{"image": "data:image/png;base64,!!!"}]).status_code == 422
    assert post(client, PHOTOS, [{"image": "data:image/svg+xml;base64,AAAA"}]).status_code == 415
    assert post(client, PHOTOS, [{"image": "data:image/png;base64,gASVAAAA"}]).status_code == 422  # a pickle
    assert post(client, PHOTOS, [{"image": bomb_url(20_000)}]).status_code == 413
    assert post(client, "v2-audio-classification", [{"audio": png_url()}]).status_code == 415
    response = client.post("/v1/predict", content=b"x", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415 and "compressed" in response.json()["error"]["message"]
    csv = client.post(
        "/v1/predict", params={"model": PHOTOS}, content=b"image\n/etc/passwd\n", headers={"Content-Type": "text/csv"}
    )
    assert csv.status_code == 415


def test_unreadable_rows_leave_no_files_and_show_no_path(client, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cut = png_url(40)[:-40]
    cut += "=" * (-len(cut.partition(",")[2]) % 4)
    one = post(client, PHOTOS, [{"image": cut}])
    assert one.status_code == 422 and "truncated-image" in one.json()["error"]["message"]
    both = post(client, PHOTOS, [{"image": cut}, {"image": png_url()}]).json()
    assert "error" in both["predictions"][0] and "label" in both["predictions"][1]
    assert str(tmp_path) not in one.text + json.dumps(both)
    for _ in range(100):
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


def test_hosts_origins_keys_and_sizes(models):
    settings = ServerSettings(api_key="a long secret", allowed_hosts=("box.example",), max_body_bytes=2000)
    with TestClient(build_app([models[TABLE]], settings), base_url=LOCAL) as client:
        key = {"Authorization": "Bearer a long secret"}
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer a long secre"}).status_code == 401
        assert client.get("/v1/models", headers=key).status_code == 200
        assert client.get("/v1/models", headers={"X-API-Key": "a long secret"}).status_code == 200
        assert client.get("/health/live").json() == {"status": "live"}
        assert client.get("/health/ready").status_code == 200
        for host, status in (
            ("evil.example", 403),
            ("box.example:8000", 200),
            ("[::1]:8000", 200),
            ("localhost", 200),
            ("", 403),
        ):
            assert client.get("/v1/models", headers=key | {"Host": host}).status_code == status, host
        for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1", 200)):
            assert client.get("/v1/models", headers=key | {"Origin": origin}).status_code == status
        assert client.post("/v1/predict", content=b"x" * 3000, headers=key).status_code == 413
        assert client.post("/v1/predict", content=iter([b"x" * 1500] * 3), headers=key).status_code == 413
        assert client.get("/v1/nothing", headers=key).json()["error"]["code"] == "not_found"
        assert client.get("/v1/predict", headers=key).status_code == 405
        response = client.get("/health/live")
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        text = client.get("/metrics", headers=key).text
        assert 'fieldguide_responses_total{route="predict",status="413"} 1' in text
    with pytest.raises(SettingsError, match="FIELDGUIDE_API_KEY"):
        ServerSettings(host="0.0.0.0")
    ServerSettings(host="0.0.0.0", api_key="a long secret")


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(extras.PACKAGES, "no_such_package", "no-such-package")
    with pytest.raises(SettingsError, match=r"needs no-such-package: pip install 'fieldguide\[serve\]'"):
        extras.check_packages()


def test_names_of_models(models):
    path = str(GOLDEN / TABLE)
    with pytest.raises(SettingsError, match="two models are called"):
        open_models([path, path + "/"], ServerSettings())
    assert [model.name for model in open_models([path, f"other={path}"], ServerSettings())] == [TABLE, "other"]


# Queue


def make_worker(**changes) -> Worker:
    worker = Worker("test", ServerSettings(**changes))
    worker.start()
    return worker


def test_jobs_that_belong_together_share_batches_and_keep_their_answers():
    seen, gate = [], threading.Event()

    def compute(jobs):
        gate.wait(5)
        seen.append([job.payload for job in jobs])
        return [ValueError("seven") if job.payload == 7 else 10 * job.payload for job in jobs]

    worker = make_worker(max_batch=4)
    first = worker.submit(Job(compute, 0, "a"))
    while worker.depth:
        time.sleep(0.001)
    futures = [worker.submit(Job(compute, i, "ab"[i % 2])) for i in range(1, 11)]
    futures[2].cancel()  # payload 3, while it waits
    gate.set()
    assert first.result(5) == 0
    for i, future in enumerate(futures, 1):
        if i == 3:
            assert future.cancelled()
        elif i == 7:
            with pytest.raises(ValueError, match="seven"):
                future.result(5)
        else:
            assert future.result(5) == 10 * i
    assert seen == [[0], [1, 5, 7, 9], [2, 4, 6, 8], [10]]
    worker.stop()


def test_a_batch_waits_a_moment_for_as_many_jobs_as_the_last_one_had(monkeypatch):
    seen = []
    compute = lambda jobs: seen.append(len(jobs)) or [0] * len(jobs)
    worker = make_worker(max_batch=32)
    worker.last_jobs, worker.last_seconds = 3, 1e6
    started = time.monotonic()
    assert (
        worker.submit(Job(compute, key="a")).result(5) == 0 and time.monotonic() - started < 2
    )  # however long the last one took
    monkeypatch.setattr("fieldguide.serving.worker.MAX_WAIT_SECONDS", 30)
    worker.last_jobs, worker.last_seconds = 3, 1e6
    first = [worker.submit(Job(compute, key="a")), worker.submit(Job(compute, key="a"))]
    time.sleep(0.1)
    assert seen == [1]
    assert [job.result(5) for job in (*first, worker.submit(Job(compute, key="a")))] == [0, 0, 0] and seen == [1, 3]
    worker.last_jobs, worker.last_seconds = 0, 1e6
    for rows in (20, 1):  # one client: its next request does not wait for as many rows
        assert worker.submit(Job(compute, key="a", rows=rows)).result(5) == 0
        worker.last_seconds = 1e6
    worker.last_jobs = 3
    assert worker.submit(Job(compute, key="a", rows=32)).result(5) == 0  # a full batch
    worker.stop()


@pytest.mark.parametrize("small, threads", [(True, 3), (False, 4)])
def test_small_networks_leave_a_core_to_requests(models, monkeypatch, small, threads):
    chosen = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(server, "SMALL_PARAMETERS", 10**9 if small else 1)
    server.limit_threads([models[TABLE]])
    assert chosen[-1] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # the user has decided
    server.limit_threads([models[TABLE]])
    assert chosen[-1] == threads


def test_a_full_queue_a_late_job_and_a_stopped_worker():
    gate = threading.Event()
    worker = make_worker(queue=2)
    compute = lambda jobs: [gate.wait(5) for _ in jobs]
    running = worker.submit(Job(compute))
    while worker.depth:
        time.sleep(0.001)
    waiting, late = worker.submit(Job(compute)), worker.submit(Job(compute, deadline=time.monotonic()))
    with pytest.raises(Exception, match="2 requests wait") as full:
        worker.submit(Job(compute))
    assert full.value.status == 429 and int(full.value.headers["Retry-After"]) >= 1
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    while not worker.stopping:
        time.sleep(0.001)
    with pytest.raises(Exception, match="stopping"):
        worker.submit(Job(compute))
    gate.set()
    stopper.join(5)
    assert running.result() and waiting.result()  # what was queued is finished
    with pytest.raises(Exception, match="too long"):
        late.result()


def test_many_clients_at_once_get_their_own_answers(client, models):
    rows, _ = make_rows(models["v2-tabular-regression"])
    alone = [post(client, "v2-tabular-regression", [row]).json()["predictions"][0]["progression"] for row in rows]
    found: dict[int, float] = {}

    def ask(i):
        found[i] = post(client, "v2-tabular-regression", [rows[i % len(rows)]]).json()["predictions"][0]["progression"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, value in found.items():
        assert value == pytest.approx(alone[i % len(rows)], rel=1e-6)
    assert len(found) == 40


def test_a_request_that_takes_too_long_stops_at_the_next_step(models):
    """It gets 504, and the model is free at once."""
    settings = ServerSettings(timeout=0.3)
    model = models["v1-image-generation"]
    with TestClient(build_app([model], settings), base_url=LOCAL) as client:
        started = time.monotonic()
        slow = client.post("/v1/predict", json={"rows": ["1"], "options": {"count": 64, "steps": 1000}})
        assert slow.status_code == 504 and slow.json()["error"]["code"] == "timeout"
        quick = client.post("/v1/predict", json={"rows": ["1"], "options": {"count": 1, "steps": 1}})
        assert quick.status_code == 200 and time.monotonic() - started < 5


# Newer runs


def test_a_newer_run_replaces_the_model(tmp_path):
    path = tmp_path / "run"
    shutil.copytree(GOLDEN / "v2-tabular-regression", path)
    settings = ServerSettings(reload_seconds=0)
    app = build_app(open_models([str(path)], settings), settings)
    served = app.state.server.pool.get(None)
    with TestClient(app, base_url=LOCAL) as client:
        row, _ = make_rows(fieldguide_model(path))
        assert client.post("/v1/predict", json={"rows": row[:1]}).status_code == 200
        assert not served.reload()
        shutil.rmtree(path)
        assert not served.reload()  # nothing is there for a moment
        shutil.copytree(GOLDEN / TABLE, path)
        damaged = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(damaged[:100])
        assert not served.reload() and not served.reload()
        assert client.post("/v1/predict", json={"rows": row[:1]}).status_code == 200
        (path / "model.safetensors").write_bytes(damaged)
        (path / "run.json").write_bytes((path / "run.json").read_bytes())
        replaced = weakref.ref(served.current)
        assert served.reload() and served.reloads == 1
        assert client.post("/v1/predict", json={"rows": row[:1]}).status_code == 422
        assert client.post("/v1/predict", json={"rows": [ROW]}).json()["predictions"][0]["label"]
        gc.collect()
        assert (
            replaced() is None and gc.get_freeze_count()
        )  # objects are exempt from collections, but not a model that was replaced
    assert not gc.get_freeze_count()


def fieldguide_model(path: Path) -> LoadedModel:
    return LoadedModel("v2-tabular-regression", str(path), ServerSettings(), fieldguide.pipeline(path))
