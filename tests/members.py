"""A link as it was measured, and files of forty images of four classes, which need no model."""

import torch
from tokmerge.channel.bler import ErrorRates
from tokmerge.channel.phy import Channel
from tokmerge.channel.schemes import Member, SentFiles
from tokmerge.channel.transmission import Link
from tokmerge.io import paths, store

LABELS = torch.arange(40) % 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def measured_link(channel=None, fading="payload"):
    """A link with the block error rates that ship with the package."""
    channel = channel or Channel()
    table = store.load_table(paths.ASSETS / "channel_study" / "bler.parquet")
    return Link(channel, ErrorRates.of(table, channel.pilots), fading)


def file(n_bytes, right=40):
    """Files of which the first ``right`` are answered rightly, if they arrive; class 9 is never right."""
    answers = torch.where(torch.arange(40) < right, LABELS, 9)
    return SentFiles(torch.full((40,), 10**7), torch.full((40,), 3 * 10**7), torch.full((40,), n_bytes), answers, 9)


def member(family, name, n_bytes, right=40, sending="whole"):
    return Member(family, name, "file", file(n_bytes, right), file(n_bytes, right), sending)
