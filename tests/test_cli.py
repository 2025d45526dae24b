"""`tokmerge serve` and `tokmerge edge` as two processes."""

import os
import signal
import subprocess
import sys

import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import cli
from tokmerge.channel.device import Reply
from tokmerge.channel.server import Responder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_served_model_answers_a_device_over_a_noisy_channel(end, capsys):
    command = [sys.executable, "-m", "tokmerge.cli", "serve", "--port", "0", "--threshold", "0.9"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        line = server.stdout.readline()
        assert line.startswith("serving fashion-vit, split after block 6, on 127.0.0.1:")
        port = line.strip().rsplit(":", 1)[1]
        cli.main(["edge", "--port", port, "--threshold", "0.9", "--images", "4", "--snr", "12", "--scheme", "4"])
    finally:
        server.send_signal(end)
        assert server.wait(60) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 images, ")
    assert "channel uses, awgn at 12 dB" in said
    assert "0 refused" in said


def of_colours():
    model = build()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    return model


@pytest.mark.parametrize(("name", "word"), [("fashion-vit", "right"), ("another", "as in one process")])
def test_a_device_says_what_its_answers_are_held_against_and_why_one_was_refused(name, word, monkeypatch, capsys):
    async def answers(arriving, host, port, identity):
        served = Responder(tokmerge.patch(model, tokmerge.Threshold(0.9), split_layer=2), torch.zeros(1, 48))
        scores = [one.numpy() for one in served.answer(arriving[1:])]
        return [Reply(None, "too much of it", 0.1), *(Reply(one, "", 0.1) for one in scores)]

    model = of_colours()
    monkeypatch.setattr(cli.zoo, "load_model", lambda *_: model)
    monkeypatch.setattr(cli, "request_answers", answers)
    cli.main(["edge", "--model", name, "--split", "2", "--threshold", "0.9", "--images", "4", "--precision", "float32"])
    said = capsys.readouterr().out
    assert f"% {word}, 1 refused" in said
    assert said.endswith("the first refusal: too much of it\n")
    assert name == "fashion-vit" or (said.startswith("4 images") and "75.0% as in one process" in said)


def test_a_model_of_colours_takes_the_grey_sample():
    model = of_colours()
    batch = cli.sample_images(tokmerge.patch(model, None, split_layer=2), "test")
    assert batch.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edge", "--port", "1", "--images", "1", "--threshold", "0.9"], "payloads unanswered"),
        (["serve", "--model", "no_such_model"], "unknown model 'no_such_model'"),
        (["serve", "--front", "nowhere.json"], "nowhere.json"),
        (["serve", "--threshold", "nan"], "thresholds is nan, not a number"),
        (["serve", "--threshold", "93"], "a cosine lies between -1 and 1"),
        (["serve", "--split", "13"], "split_layer is 13, but the model has 12 blocks"),
    ],
)
def test_trouble_is_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--precision", "int5", "invalid choice: 'int5'"),
        ("--port", "99999", "99999 is no whole number from 0 to 65535"),
        ("--images", "-1", "-1 is no whole number from 1"),
        ("--split", "1.5", "1.5 is no whole number from 0"),
    ],
)
def test_what_the_parser_refuses(option, value, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["edge", f"{option}={value}"])
    assert message in capsys.readouterr().err
