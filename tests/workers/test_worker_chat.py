"""Annotation by a model of one's own: the requests that an endpoint would get are answered by workers."""

import asyncio
import base64
import json
import sys

import pytest
from workers.test_workers import png

from llava_cot import SwiresGenerator, cli
from llava_cot.data import shapes
from llava_cot.data.annotation.cost import Usage
from llava_cot.endpoint import RequestFailed
from llava_cot.workers.chat import open_chat
from llava_cot.workers.task import ModelSettings

SETTINGS = ModelSettings("tiny", "sample", {"max_new_tokens": 120})


def test_a_chat_is_an_answer():
    sample = shapes.sample(801_000)
    url = "data:image/png;base64," + base64.b64encode(png(sample.image)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
    chat, usage = open_chat("local", SETTINGS, 4), Usage()

    async def ask():
        same = chat.ask([{"role": "user", "content": content}], usage, seed=7)
        text_alone = chat.ask([{"role": "user", "content": sample.question}], usage)
        bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, content[1]]
        with pytest.raises(RequestFailed, match="image must be a readable image"):
            await chat.ask([{"role": "user", "content": bad}], usage)
        return await asyncio.gather(same, text_alone)

    reply, _ = asyncio.run(ask())
    answer = SwiresGenerator.from_pretrained("tiny").answer(url, sample.question, "sample", seed=7, max_new_tokens=120)
    assert reply.text == answer.text and reply.is_cut is not answer.ended and reply.model == "tiny"
    assert usage.requests == 3 and usage.prompt_tokens > 0 and usage.completion_tokens >= answer.usage.generated_tokens


def test_annotate_with_workers(tmp_path, monkeypatch, capsys):
    rows = []
    for number in range(3):
        sample = shapes.sample(801_000 + number)
        sample.image.save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "question": sample.question, "answer": sample.answer})
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(questions), str(out), "--model", "tiny", "--workers", "local", "--max-tokens", "150"]
    monkeypatch.setattr(sys, "argv", ["llava-cot", "annotate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0, capsys.readouterr().err
    files = (out, tmp_path / "out.rejects.jsonl")
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(record["id"] for record in records) == ["0", "1", "2"]
    assert all(record.get("kind") in (None, "violation", "judge") for record in records)


def test_workers_and_an_endpoint_exclude_each_other(tmp_path, monkeypatch, capsys):
    arguments = ["q.jsonl", "out.jsonl", "--model", "tiny", "--workers", "local", "--base-url", "http://localhost/v1"]
    monkeypatch.setattr(sys, "argv", ["llava-cot", "annotate", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "base_url must not be given with workers='local'" in capsys.readouterr().err
