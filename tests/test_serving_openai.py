"""The API of OpenAI on a real socket, called by the unmodified client: chat, completions, embeddings, recordings, images."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch

import fieldguide
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.serving.models import open_models
from fieldguide.serving.settings import ServerSettings
from live import live_server
from test_pretrained import settled
from test_speaker import TEMPLATE, bpe
from tv import transformers

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 96
QUESTION = [{"role": "user", "content": "who sat on the mat?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with random weights, a tokenizer and a chat template, as transformers saves it."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = bpe()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    settled(transformers.LlamaForCausalLM(config)).save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def speaker(folder):
    return TextGenerator.load(folder)


@pytest.fixture(scope="module")
def address(folder):
    names = (
        "v1-text-generation",
        "v1-translation",
        "v1-fill-mask",
        "v1-automatic-speech-recognition",
        "v1-image-generation",
        "v2-text-embedding",
    )
    sources = [str(folder), *(f"{name[3:]}={GOLDEN / name}" for name in names)]
    settings = ServerSettings(slots=3)
    with live_server(open_models(sources, settings), settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_models(client):
    assert [model.id for model in client.models.list()][:2] == ["tiny-llama", "text-generation"]
    assert client.models.retrieve("tiny-llama").owned_by == "fieldguide"
    with pytest.raises(openai.NotFoundError, match=r"tiny-lama.*Did you mean 'tiny-llama'"):
        client.models.retrieve("tiny-lama")


def test_chat(client, speaker):
    wanted = speaker.generate([QUESTION], max_new_tokens=12, temperature=0.0)[0]
    answer = client.chat.completions.create(model="tiny-llama", messages=QUESTION, max_tokens=12, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == wanted and choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(speaker.tokens(QUESTION))
    assert answer.usage.completion_tokens == 12 and choice.finish_reason == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    again = client.chat.completions.create(
        model="tiny-llama", messages=parts, max_completion_tokens=12, temperature=0, n=2, user="a", top_p=1.0, seed=1
    )
    assert [c.message.content for c in again.choices] == [wanted, wanted]
    assert again.usage.prompt_tokens == answer.usage.prompt_tokens and again.usage.completion_tokens == 24


def test_chat_in_pieces(client, speaker):
    wanted = speaker.generate([QUESTION], max_new_tokens=20, temperature=0.0)[0]
    stream = client.chat.completions.create(
        model="tiny-llama",
        messages=QUESTION,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert len({c.id for c in chunks}) == 1


def test_limits_of_an_answer(client, speaker):
    """null means no limit: the answer ends with the context. Stop strings end it and are not part of it."""
    whole = client.chat.completions.create(model="tiny-llama", messages=QUESTION, max_tokens=None, temperature=0)
    assert whole.usage.total_tokens == LENGTH or whole.choices[0].finish_reason == "stop"
    text = client.completions.create(model="tiny-llama", prompt="the cat", max_tokens=30, temperature=0).choices[0].text
    stop = text[5:8]
    cut = client.completions.create(model="tiny-llama", prompt="the cat", max_tokens=30, temperature=0, stop=[stop, "§"])
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    pieces = client.completions.create(
        model="tiny-llama", prompt="the cat", max_tokens=30, temperature=0, stop=stop, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text[: text.index(stop)]
    default = client.completions.create(model="tiny-llama", prompt="the cat")
    assert default.usage.completion_tokens <= 16
    assert default.choices[0].text != client.completions.create(model="tiny-llama", prompt="the cat").choices[0].text


def test_completions_of_several_prompts_and_of_runs(client, speaker):
    prompts = ["the cat", "who", "a dog ran"]
    answer = client.completions.create(model="tiny-llama", prompt=prompts, max_tokens=5, temperature=0, n=2)
    wanted = [speaker.generate([prompt], max_new_tokens=5, temperature=0.0)[0] for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == wanted
    run = fieldguide.open_run(GOLDEN / "v1-text-generation")
    wanted = run.predict(["Rain fell on"], max_new_tokens=12, seed=1)[0]["text"]
    asked = {"max_tokens": 12, "seed": 1, "temperature": 0.8, "top_p": 0.95}
    assert client.completions.create(model="text-generation", prompt="Rain fell on", **asked).choices[0].text == wanted
    run = fieldguide.open_run(GOLDEN / "v1-translation")
    text = "In summer an old house sells a good bird."
    assert client.completions.create(model="translation", prompt=text).choices[0].text == run.predict([text])[0]["text"]


def test_many_conversations_at_once_are_those_alone(client, speaker):
    """More texts than slots, which join and leave while others are generated."""
    prompts = [f"{word} {'cat ' * k}" for k in range(4) for word in ("the", "who sat", "a dog")]
    sizes = [5 + 3 * (i % 5) for i in range(len(prompts))]
    wanted = [speaker.generate([p], max_new_tokens=n, temperature=0.0)[0] for p, n in zip(prompts, sizes)]
    found: dict[int, str] = {}

    def ask(i):
        time.sleep(0.01 * (i % 4))
        stream = client.completions.create(
            model="tiny-llama", prompt=prompts[i], max_tokens=sizes[i], temperature=0, stream=True
        )
        found[i] = "".join(piece.choices[0].text for piece in stream)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == wanted


def test_predict_generates_in_slots(address, speaker):
    rows = ["the cat", QUESTION]
    body = {"model": "tiny-llama", "rows": rows, "options": {"max_new_tokens": 6, "temperature": 0}}
    records = httpx.post(f"{address}/v1/predict", json=body).json()["predictions"]
    assert records == speaker.predict(rows, max_new_tokens=6, temperature=0)
    body["options"] = {"max_new_tokens": 6, "num_beams": 3}
    assert httpx.post(f"{address}/v1/predict", json=body).json()["predictions"] == speaker.predict(
        rows, max_new_tokens=6, num_beams=3
    )
    body["options"] = {"max_new_tokens": 6, "chat": False, "temperature": 0}
    assert httpx.post(f"{address}/v1/predict", json=body | {"rows": ["the cat"]}).json()["predictions"] == speaker.predict(
        ["the cat"], max_new_tokens=6, chat=False, temperature=0
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"messages": []}, "length >= 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "king"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": "cat " * 200}]}, "Shorten"),
        ({"n": 10_000}, "At most 8"),
        ({"max_tokens": 0}, ">= 1"),
        ({"temperature": 3}, "<= 2"),
        ({"temperature": "hot"}, "a number"),
        ({"stop": ""}, "length >= 1"),
        ({"stop": ["a"] * 20}, "length <= 16"),
        ({"seed": 1 << 60}, "at seed"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"colour": 3}, "'colour' is unknown"),
        ({"model": "fill-mask"}, "does not chat"),
    ],
)
def test_wrong_chat_requests(address, changes, text):
    body = {"model": "tiny-llama", "messages": QUESTION, "max_tokens": 3} | changes
    response = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert response.status_code in (400, 422) and text in response.json()["error"]["message"], response.text


def test_errors_become_exceptions_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="Call /v1/completions"):
        client.chat.completions.create(model="text-generation", messages=QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="does not embed"):
        client.embeddings.create(model="tiny-llama", input="x")


def test_embeddings(client, address):
    """The client asks for base64 by itself; both forms hold the vectors of `embed`."""
    texts = ["rain fell", "the old house by the river"]
    wanted = fieldguide.open_run(GOLDEN / "v1-fill-mask").embed(texts)
    answer = client.embeddings.create(model="fill-mask", input=texts)
    np.testing.assert_allclose([item.embedding for item in answer.data], wanted, atol=1e-6)
    assert answer.usage.prompt_tokens > 2
    trained = client.embeddings.create(model="text-embedding", input=texts)  # a run that was trained to embed
    expected = [record["vector"] for record in fieldguide.open_run(GOLDEN / "v2-text-embedding").predict(texts)]
    np.testing.assert_allclose([item.embedding for item in trained.data], expected, atol=1e-6)
    plain = client.embeddings.create(model="fill-mask", input=texts[0], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, wanted[0], atol=1e-6)
    raw = httpx.post(
        f"{address}/v1/embeddings", json={"model": "fill-mask", "input": texts, "encoding_format": "base64"}
    ).json()
    vector = np.frombuffer(base64.b64decode(raw["data"][1]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, wanted[1], atol=1e-6)
    for wrong in ({"input": []}, {"input": ""}, {"input": [1, 2]}, {"input": "x", "dimensions": 3}):
        assert httpx.post(f"{address}/v1/embeddings", json={"model": "fill-mask", **wrong}).status_code in (400, 422), wrong


def test_transcriptions(client):
    path = GOLDEN / "v1-automatic-speech-recognition" / "input-0.wav"
    model = "automatic-speech-recognition"
    with path.open("rb") as file:
        assert client.audio.transcriptions.create(model=model, file=file).text == "e"
    content = path.read_bytes()
    assert client.audio.transcriptions.create(model=model, file=("a.wav", content), response_format="text") == "e\n"
    detailed = client.audio.transcriptions.create(model=model, file=("a.wav", content), response_format="verbose_json")
    assert detailed.segments[0].start == pytest.approx(0.68) and detailed.duration == pytest.approx(0.72)
    srt = client.audio.transcriptions.create(model=model, file=("a.wav", content), response_format="srt")
    assert "1\n00:00:00,680 --> 00:00:00,720\ne" in srt
    vtt = client.audio.transcriptions.create(model=model, file=("a.wav", content), response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:00.680")
    with pytest.raises(openai.BadRequestError, match="no option 'language'"):
        client.audio.transcriptions.create(model=model, file=("a.wav", content), language="de")
    with pytest.raises(openai.APIStatusError, match="cannot be read"):
        client.audio.transcriptions.create(model=model, file=("a.wav", b"RIFF" + content[:8]))
    url = f"{client.base_url}audio/translations"
    response = httpx.post(url, data={"model": model}, files={"file": ("a.wav", content)})
    assert response.status_code == 400 and "does not translate" in response.json()["error"]["message"]


def test_images(client):
    answer = client.images.generate(model="image-generation", prompt="3", n=2, extra_body={"seed": 1, "steps": 3})
    wanted = fieldguide.open_run(GOLDEN / "v1-image-generation").predict(["3"], count=2, steps=3, seed=1)
    assert [base64.b64decode(image.b64_json) for image in answer.data] == [record["image"].content for record in wanted]
    with pytest.raises(openai.APIStatusError, match="'cat' at prompt"):
        client.images.generate(model="image-generation", prompt="cat")
    with pytest.raises(openai.APIStatusError, match="invalid enum value 'url'"):
        client.images.generate(model="image-generation", prompt="3", response_format="url")
    with pytest.raises(openai.BadRequestError, match="8x8"):
        client.images.generate(model="image-generation", prompt="3", n=1, size="256x256", extra_body={"steps": 1})


def test_clients_that_leave_free_their_slots(address, speaker):
    """Connections are cut in the middle of streams and of waiting requests; those that stay get their answers."""
    url = httpx.URL(address)

    def leave(body: dict, path: str, after: float) -> None:
        content = json.dumps(body).encode()
        with socket.create_connection((url.host, url.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            time.sleep(after)

    request = {"model": "tiny-llama", "messages": QUESTION, "temperature": 0, "n": 8}
    threads = [
        threading.Thread(target=leave, args=(request | {"stream": i % 2 == 0}, "/v1/chat/completions", 0.01 * (i % 5)))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    wanted = speaker.generate(["the cat"], max_new_tokens=9, temperature=0.0)[0]
    body = {"model": "tiny-llama", "prompt": "the cat", "max_tokens": 9, "temperature": 0}
    for _ in range(5):
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"] == wanted
    for thread in threads:
        thread.join()
    for _ in range(200):
        metrics = httpx.get(f"{address}/metrics").text
        if 'slots_in_use{model="tiny-llama"} 0' in metrics and 'queue_depth{model="tiny-llama"} 0' in metrics:
            break
        time.sleep(0.02)
    else:
        pytest.fail(metrics)
