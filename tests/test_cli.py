"""`tokmerge serve` and `tokmerge edge` as two processes."""

import os
import signal
import subprocess
import sys

import pytest
import tokmerge
from conftest import build
from tokmerge import cli

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


def test_a_model_of_colours_takes_the_grey_sample():
    model = build()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    batch = cli.sample_images(tokmerge.patch(model, None, split_layer=2), "test")
    assert batch.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edge", "--port", "1", "--images", "1", "--threshold", "0.9"], "payloads unanswered"),
        (["serve", "--model", "no_such_model"], "unknown model 'no_such_model'"),
        (["serve", "--front", "nowhere.json"], "nowhere.json"),
    ],
)
def test_trouble_is_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


def test_unknown_choices_are_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edge", "--precision", "int5"])
    assert "invalid choice: 'int5'" in capsys.readouterr().err
