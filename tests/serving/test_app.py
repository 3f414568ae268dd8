"""Answers, and errors in the shapes of OpenAI and Ollama."""

import base64
import json

import pytest

from ..fixtures import tiny
from ..fixtures.image_files import png as png_header
from .requests import CHAT, NAME, chat_body, data_url, picture_url, png


def error_of(response) -> dict:
    """Return the error of a response after a check of its shape."""
    error = response.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 500
    return error


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_caption_of_the_model(client, captioner):
    assert client.caption(picture_url(3)) == captioner.caption(tiny.picture(3))


def test_text_is_the_prompt_that_the_caption_continues(client, captioner):
    assert client.caption(picture_url(3), "a red") == captioner.caption(tiny.picture(3), "a red")
    assert client.caption(picture_url(3), "a red") != client.caption(picture_url(3))


def test_ignored_text_gives_the_prompt_of_the_server(serve, captioner):
    client = serve(ignore_text=True, prompt="two small")
    assert client.caption(picture_url(3), "Describe this.") == captioner.caption(tiny.picture(3), "two small")


def test_the_shape_of_a_chat_completion(client):
    answer = client.chat().json()
    assert (answer["object"], answer["model"]) == ("chat.completion", NAME)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_max_tokens_shortens_the_caption(client, captioner):
    answer = client.chat(max_tokens=2).json()["choices"][0]
    assert answer["message"]["content"] == captioner.caption(tiny.picture(1), max_new_tokens=2)
    assert answer["finish_reason"] == "length"


def test_max_tokens_above_the_limit_is_the_limit(client, captioner):
    assert client.caption(max_completion_tokens=4000) == captioner.caption(tiny.picture(1))


def test_beams_of_the_server(serve, captioner):
    client = serve(num_beams=3)
    assert client.caption() == captioner.caption(tiny.picture(1), num_beams=3)
    choices = client.chat(n=3).json()["choices"]
    best = captioner.caption(tiny.picture(1), num_beams=3, num_return_sequences=3)
    assert [choice["message"]["content"] for choice in choices] == best


def test_a_seed_repeats_a_sample(client):
    samples = [client.caption(temperature=1.5, seed=seed) for seed in (1, -(2**63), 2**63 - 1, 1)]
    assert samples[0] == samples[3]
    assert len({*samples}) > 1


def test_a_seed_repeats_a_sample_of_a_captioner_that_samples_by_itself(serve, captioner, monkeypatch):
    monkeypatch.setattr(captioner.generation_config, "do_sample", True)
    monkeypatch.setattr(captioner.generation_config, "temperature", 1.5)
    samples = [serve().caption(seed=seed) for seed in (1, 2, 3, 1)]
    assert samples[0] == samples[3]
    assert len({*samples}) > 1


def test_temperature_0_is_greedy(client, captioner):
    assert client.caption(temperature=0, seed=4) == captioner.caption(tiny.picture(1), do_sample=False)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 0.02, 2])
def test_extreme_temperatures_are_answered(client, temperature):
    assert client.chat(temperature=temperature, top_p=0).status_code == 200


def test_several_captions_without_beams_are_sampled(client):
    answer = client.chat(n=4).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


def test_stop_ends_the_caption(client):
    whole = client.caption()
    word = whole.split()[2]
    assert client.caption(stop=[word, "never"]) == whole[: whole.find(word)].rstrip()


def test_a_stream_holds_the_caption_and_its_end(client):
    response = client.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == client.caption()
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"] > 0) == ([], True)


def test_the_last_image_of_a_conversation_is_captioned(client, captioner):
    first, second = (chat_body(picture_url(seed))["messages"][0] for seed in (1, 2))
    messages = [{"role": "system", "content": "Be brief."}, first, {"role": "assistant", "content": "a dog"}, second]
    messages += [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "a red"}]
    answer = client.post(CHAT, json={"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == captioner.caption(tiny.picture(2), "a red")


def test_a_model_of_stage_1_is_served(tmp_path):
    from qformer_captioner.hub.load import load_captioner

    from .requests import Client

    model = load_captioner(tiny.save_stage1(tmp_path))
    with Client(model) as client:
        assert client.caption() == model.caption(tiny.picture(1))
        assert client.caption(max_tokens=4000) == model.caption(tiny.picture(1))
        assert client.caption(text="a red") == model.caption(tiny.picture(1), "a red")


def test_models_are_listed(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME]
    assert client.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert client.get("/v1/models/gpt-4o").status_code == 404


def test_metrics_count_requests_and_captions(serve):
    client = serve()
    client.chat(temperature=1.0, n=3)
    client.chat("data:broken")
    client.get("/no/such/address")
    lines = client.get("/metrics").text.splitlines()
    chat = 'qformer_captioner_requests_total{path="/v1/chat/completions",status='
    assert {f'{chat}"200"}} 1.0', f'{chat}"400"}} 1.0', "qformer_captioner_captions_total 3.0"} <= {*lines}
    assert 'qformer_captioner_requests_total{path="other",status="404"} 1.0' in lines


# --- Errors -----------------------------------------------------------------------------------------------------------

WRONG_BODIES = {
    "not JSON": (b"{", 400, "not valid JSON"),
    "nothing": (b"", 400, "not valid JSON"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "not valid JSON"),
    "deep": (b"[" * 100_000, 400, "not valid JSON"),
    "NaN": (b'{"temperature": NaN}', 400, "not valid JSON"),
    "long number": (b'{"seed": 1' + b"0" * 5000 + b"}", 400, "not valid JSON"),
    "list": (b"[]", 400, "mistake"),
    "no messages": (b"{}", 400, "'messages'"),
    "empty messages": (b'{"messages": []}', 400, "'messages'"),
    "no image": (b'{"messages": [{"role": "user", "content": "Hello"}]}', 400, "no image"),
    "no content": (b'{"messages": [{"role": "user"}]}', 400, "no image"),
}


@pytest.mark.parametrize("kind", WRONG_BODIES)
def test_a_wrong_body_is_refused(client, kind):
    body, status, message = WRONG_BODIES[kind]
    response = client.post(CHAT, content=body)
    assert response.status_code == status
    assert message in error_of(response)["message"]


WRONG_FIELDS = {
    "model": ({"model": "gpt-4o"}, 404, "model"),
    "hot": ({"temperature": 3}, 400, "temperature"),
    "infinite": ({"temperature": 1e999}, 400, None),
    "text as number": ({"temperature": "warm"}, 400, "temperature"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "many captions": ({"n": 1000}, 400, "n"),
    "large seed": ({"seed": 2**63, "temperature": 1}, 400, "seed"),
    "greedy captions": ({"n": 2, "temperature": 0}, 400, "n"),
    "JSON": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "log-probabilities": ({"logprobs": True}, 400, "logprobs"),
    "long text": ({"text": "a red " * 1000}, 400, "messages"),
    "too many tokens": ({"text": "a red " * 40}, 400, None),
    "surrogate": ({"text": "\ud800"}, 400, "messages"),
}


@pytest.mark.parametrize("kind", WRONG_FIELDS)
def test_a_wrong_field_is_refused(client, kind):
    fields, status, param = WRONG_FIELDS[kind]
    response = client.post(CHAT, content=json.dumps(chat_body(**fields)))
    assert (response.status_code, error_of(response)["param"]) == (status, param)


def test_a_part_of_another_type_is_refused(client):
    body = chat_body()
    body["messages"][0]["content"].append({"type": "input_audio", "input_audio": {"data": ""}})
    assert "input_audio" in error_of(client.post(CHAT, json=body))["message"]


def test_several_images_are_refused_by_a_captioner_of_single_images(client):
    body = chat_body()
    body["messages"][0]["content"] *= 2
    assert "2 images" in error_of(client.post(CHAT, json=body))["message"]


TRUNCATED = png(tiny.picture(1))[:2000]
WRONG_IMAGES = {
    "not base64": ("data:image/png,abc", 400),
    "no comma": ("data:image/png;base64", 400),
    "not ASCII": ("data:image/png;base64,äöü", 400),
    "empty": ("data:image/png;base64,", 422),
    "truncated": (data_url(TRUNCATED), 422),
    "text": (data_url(b"This is text."), 422),
    "SVG": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 422),
    "JPEG XL": (data_url(b"\xff\n" + bytes(100)), 422),
    "PostScript": (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), 422),
    "bomb": (data_url(png_header(60_000, 60_000)), 422),
    "large": (data_url(png_header(8000, 8000)), 413),
    "strip": (data_url(png_header(2000, 2)), 422),
    "data URL in base64": (data_url(b"data:image/png;base64,AAAA"), 422),
    "path in base64": (data_url(b"/etc/passwd"), 422),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_a_wrong_image_is_refused(client, kind):
    url, status = WRONG_IMAGES[kind]
    response = client.chat(url)
    assert response.status_code == status
    assert error_of(response)["param"] == "messages"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "etc/passwd",
        "C:\\secret.png",
        "ftp://example.org/a.png",
        "gopher://localhost",
        "http://localhost:8000/health",
        "http://127.0.0.1/",
        "https://[::1]/",
        "http://169.254.169.254/latest/meta-data",
        "//example.org/a.png",
        "",
        " data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "blob:http://example.org/1",
    ],
)
def test_nothing_but_embedded_images_is_read(client, url, tmp_path):
    body = chat_body()
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    assert client.post(CHAT, json=body).status_code == 400


def test_a_file_of_the_server_is_not_read(client, tmp_path):
    path = tmp_path / "secret.png"
    tiny.picture(1).save(path)
    refused = [client.chat(f"{prefix}{path}") for prefix in ("", "file://", "file:", "file://localhost")]
    refused.append(client.post("/api/generate", json={"model": NAME, "images": [str(path)], "stream": False}))
    assert {response.status_code for response in refused} <= {400, 422}


def test_large_requests_are_refused(serve):
    client = serve(max_body_bytes=10_000)
    assert client.chat("data:image/png;base64," + "A" * 20_000).status_code == 413
    assert client.post(CHAT, content=(b"A" * 1000 for _ in range(20))).status_code == 413  # without a stated length
    assert client.chat().status_code == 200


def test_an_unknown_address_has_an_error_of_the_same_shape(client):
    assert error_of(client.get("/v1/embeddings"))["code"] == "unknown_url"


def test_another_method_is_refused_with_the_one_to_use(client):
    for refused, method in ((client.get(CHAT), "POST"), (client.delete("/v1/models"), "GET")):
        assert (refused.status_code, refused.headers["allow"]) == (405, method)
        assert f"takes {method}" in error_of(refused)["message"]


def test_a_failure_of_the_model_is_said_and_logged(serve, captioner, monkeypatch, log):
    def fail(*args, **kwargs):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr("qformer_captioner.serving.model_thread.caption_rows", fail)
    response = serve().chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "A request failed." in log.text


# --- The key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer s\u00e9cret"])
def test_a_wrong_key_is_refused(serve, header):
    client = serve(api_key="secret")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in (CHAT, "/v1/responses", "/api/generate"):
        assert client.post(path, json=chat_body(), headers=headers).status_code == 401
    for path in ("/v1/models", "/api/tags"):
        assert client.get(path, headers=headers).status_code == 401
    for path in ("/health", "/live", "/metrics"):
        assert client.get(path).status_code == 200


def test_the_key_opens_the_server(serve):
    client = serve(api_key="secret")
    response = client.post(CHAT, json=chat_body(), headers={"Authorization": "Bearer secret"})
    assert response.status_code == 200


# --- Other doors ------------------------------------------------------------------------------------------------------


def test_the_request_of_photoprism_as_a_client_of_ollama(client, captioner):
    content = base64.b64encode(png(tiny.picture(3))).decode()
    body = {"id": "1", "model": f"{NAME}:latest", "prompt": "a red", "suffix": "", "stream": False, "images": [content]}
    body["options"] = {"temperature": 0.001}
    answer = client.post("/api/generate", json=body).json()
    assert answer["response"] == captioner.caption(tiny.picture(3), "a red")
    assert (answer["model"], answer["done"]) == (f"{NAME}:latest", True)


def test_labels_for_photoprism_are_refused(client):
    body = {"model": NAME, "format": "json", "stream": False, "images": [""]}
    response = client.post("/api/generate", json=body)
    assert response.status_code == 400
    assert "plain text" in response.json()["error"]


def test_a_stream_of_ollama(client):
    content = base64.b64encode(png(tiny.picture(1))).decode()
    response = client.post("/api/generate", json={"model": NAME, "images": [content]})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["response"] for line in lines) == client.caption()
    assert [line["done"] for line in lines] == [False, True]


def test_the_request_of_photoprism_as_a_client_of_openai(client, captioner):
    parts = [
        {"type": "input_text", "text": "a red"},
        {"type": "input_image", "image_url": picture_url(3), "detail": "low"},
    ]
    messages = [
        {"role": "system", "type": "message", "content": [{"type": "input_text", "text": "You are a vision model."}]},
        {"role": "user", "type": "message", "content": parts},
    ]
    body = {"model": NAME, "input": messages, "reasoning": {"effort": "low"}, "max_output_tokens": 512}
    answer = client.post("/v1/responses", json=body).json()
    assert answer["output"][0]["content"][0]["text"] == captioner.caption(tiny.picture(3), "a red")
    labels = {**body, "text": {"format": {"type": "json_schema", "name": "labels", "schema": {}}}}
    assert client.post("/v1/responses", json=labels).status_code == 400


def test_the_request_of_open_webui(client, captioner):
    content = [{"type": "text", "text": "a red"}, {"type": "image_url", "image_url": {"url": picture_url(3)}}]
    body = {
        "stream": True,
        "model": NAME,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
        "stream_options": {"include_usage": True},
        "user": {"name": "A", "id": "1", "email": "a@example.org", "role": "admin"},
        "tools": [],
    }
    events = client.post(CHAT, json=body).text.split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == captioner.caption(tiny.picture(3), "a red")
