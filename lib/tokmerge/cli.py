"""`tokmerge serve` and `edge`: device and server that talk over HTTP. `tokmerge search`: how much a model can merge."""

import argparse
import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    import numpy as np
    import torch

    from tokmerge.channel.device import payloads, request_answers
    from tokmerge.channel.phy import FADING, LADDER, Channel, send_bytes
    from tokmerge.channel.segmentation import protected_means
    from tokmerge.channel.server import Responder, Server, identity
    from tokmerge.data import fashion_mnist, image_sets
    from tokmerge.data.imagenet import picture_folder
    from tokmerge.io.extras import extra
    from tokmerge.merging.front import load_front
    from tokmerge.merging.policies import Threshold
    from tokmerge.models import zoo
    from tokmerge.models.classifier import MergedClassifier
    from tokmerge.models.merged import digest_weights
    from tokmerge.models.patching import patch
    from tokmerge.wire import PRECISIONS
except ModuleNotFoundError as missing:
    raise SystemExit(f"tokmerge: {missing.name} is missing: pip install 'tokmerge[channel]'") from missing


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """What reads a whole number within limits from the command line."""

    def read(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return read


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="tokmerge", description="Merged tokens from a device to a server.")
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="answer payloads over HTTP")
    edge = commands.add_parser("edge", help="send images and print what comes back")
    search = commands.add_parser("search", help="how much a model can merge on pictures in a folder; no labels needed")
    search.add_argument("--model", required=True, help="a timm name, saliency-vit or fashion-vit")
    search.add_argument("--images", required=True, help="folder with pictures")
    search.add_argument("--out", default="tokmerge-search", help="folder for front.json and report.md")
    search.add_argument("--trials", type=whole(4), default=64, help="default 64")
    search.add_argument("--pictures", type=whole(4), default=64, help="that every trial is measured on (default 64)")
    search.add_argument("--seed", type=whole(0), default=0)
    for command in (serve, edge, search):
        command.add_argument("--checkpoint", help="local weights of the model")
    for command in (serve, edge):
        command.add_argument("--host", default="127.0.0.1")
        command.add_argument(
            "--port", type=whole(0, 65535), default=7341, help="default 7341; serve: 0 for any that is free"
        )
        command.add_argument("--model", default=zoo.FASHION_VIT, help="fashion-vit (default) or a timm name")
        command.add_argument("--split", type=whole(0), default=6, help="blocks that run on the device (default 6)")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--threshold", type=float, default=0.93, help="one for all blocks (default 0.93; 1: off)")
        which.add_argument("--front", help="policy file: its point with fewest MACs within --max-drop")
        command.add_argument("--max-drop", type=float, default=0.005, help="of accuracy, with --front (default 0.005)")
    edge.add_argument("--precision", choices=PRECISIONS, default="int8")
    edge.add_argument("--images", type=whole(1), default=64, help="test images of the sample to send (default 64)")
    edge.add_argument("--channel", choices=FADING, default="awgn")
    edge.add_argument("--snr", type=float, help="average SNR in dB; without it nothing is lost")
    edge.add_argument("--scheme", type=int, default=4, choices=range(len(LADDER)),
                      help="; ".join(f"{i}: {one}" for i, one in enumerate(LADDER)))  # fmt: skip
    edge.add_argument("--seed", type=int, default=0)
    return top


def load_merged(given: argparse.Namespace, precision: str) -> MergedClassifier:
    """The model that device and server share."""
    model, policy = zoo.load_model(given.model, given.checkpoint), None
    if given.front:
        policy = load_front(given.front, digest_weights(model)).pick(given.max_drop)
    elif given.threshold != Threshold.OFF:
        policy = Threshold(given.threshold)
    return patch(model, policy, precision=precision, split_layer=given.split)


def sample_images(merged: MergedClassifier, split: str) -> image_sets.Batch:
    """The sample that ships with the package."""
    return image_sets.tensors(fashion_mnist.sample(split), zoo.transform(merged.model))


async def run_server(given: argparse.Namespace) -> None:
    """Run a server until it is interrupted or told to end (SIGINT, SIGTERM)."""
    ended = asyncio.Event()
    # Handlers of our own: a process started in the background of a script has interrupts switched off.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    merged = load_merged(given, "int8")
    with torch.inference_mode():
        prototype = protected_means(merged.edge(sample_images(merged, "train").images), merged.protected)
    responder = Responder(merged, prototype)
    server = Server(responder, identity(merged), max_bytes=responder.longest)
    host, port = await server.start(given.host, given.port)
    print(f"serving {given.model}, split after block {given.split}, on {host}:{port}", flush=True)
    try:
        await ended.wait()
    finally:
        await server.stop()


async def run_device(given: argparse.Namespace) -> None:
    """Send images, print accuracy, bytes and latency, and why a payload was refused."""
    merged = load_merged(given, given.precision)
    batch = sample_images(merged, "test")
    sent = payloads(merged, batch.images[: given.images])
    arriving, over = sent, ""
    if given.snr is not None:
        scheme, channel, generator = LADDER[given.scheme], Channel(given.channel), torch.Generator()
        generator.manual_seed(given.seed)
        arriving = [send_bytes(payload, scheme, channel, given.snr, generator)[0] for payload in sent]
        uses = np.mean([scheme.blocks(len(payload)) * channel.uses(scheme) for payload in sent])
        over = f", {uses:,.0f} channel uses, {given.channel} at {given.snr:g} dB"
    replies = await request_answers(arriving, given.host, given.port, identity(merged))
    # The sample's classes are one model's; others are held against themselves, whole and in one process.
    labels, word = batch.labels[: given.images], "right"
    if given.model != zoo.FASHION_VIT:
        with torch.inference_mode():
            labels, word = merged(batch.images[: given.images])[0].flatten(1).argmax(1), "as in one process"
    right = [reply.scores is not None and int(reply.scores.argmax()) == label
             for reply, label in zip(replies, labels.tolist(), strict=True)]  # fmt: skip
    failures = [reply.failure for reply in replies if reply.scores is None]
    print(f"{len(sent)} images, {np.mean([len(payload) for payload in sent]):,.0f} bytes each{over}: "
          f"{np.mean(right):.1%} {word}, {len(failures)} refused, "
          f"{1e3 * np.median([reply.seconds for reply in replies]):.0f} ms from sending to the answer")  # fmt: skip
    if failures:
        print(f"the first refusal: {failures[0]}")


def run_search(given: argparse.Namespace) -> None:
    """Search thresholds on a folder of pictures, and print the page about it."""
    with extra("all"):
        from tokmerge.search.own_pictures import search_pictures

    model = zoo.load_model(given.model, given.checkpoint)
    patch(model, None)  # what cannot be merged in is refused before the pictures are read
    images, out = picture_folder(given.images), Path(given.out)
    search_pictures(given.model, model, images, out, given.trials, given.pictures, seed=given.seed)
    print((out / "report.md").read_text())
    print(f"written: {out / 'front.json'}, {out / 'report.md'}, {out / 'report.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "search":
            run_search(given)
        else:
            asyncio.run(run_server(given) if given.command == "serve" else run_device(given))
    except KeyboardInterrupt:
        pass
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"tokmerge {given.command}: {error}") from error


if __name__ == "__main__":
    main()
