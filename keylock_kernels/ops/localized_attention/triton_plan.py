"""How the Triton kernels of localized attention cut keys, heads and pixels, and the tables of configurations."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch

from ..launching import ceil_div, processors


class Group(NamedTuple):
    """Image streams handled together: short ones share a tile, a long one is alone."""

    long: bool
    start: int  # the first key, counted over all image streams
    stream: int  # the first stream
    first: int  # keys of its tiles: one, or two
    second: int
    lengths: tuple[int, ...]
    end: int  # the number behind the last key


def cut(length: int) -> tuple[int, int]:
    """The sizes of the one or two tiles that hold a short stream."""
    rounded = 16 * max(1, ceil_div(length, 16))
    return {48: (32, 16), 80: (64, 16)}.get(rounded, (rounded, 0))


@functools.lru_cache(maxsize=256)
def pack(lengths: tuple[int, ...], short: int) -> tuple[Group, ...]:
    """Image streams as groups: those of at most 16 keys fill tiles of 16 in their order; more than `short` are long."""
    groups: list[Group] = []
    start = 0
    for stream, length in enumerate(lengths):
        last = groups[-1] if groups else None
        if last is not None and last.first == 16 and not last.second and sum(last.lengths) + length <= 16:
            groups[-1] = last._replace(lengths=(*last.lengths, length), end=start + length)
        elif length > short:
            groups.append(Group(True, start, stream, 0, 0, (length,), start + length))
        else:
            groups.append(Group(False, start, stream, *cut(length), (length,), start + length))
        start += length
    return tuple(sorted(groups, key=lambda group: not group.long))


def streams(groups: tuple[Group, ...]) -> tuple[tuple[int, int], ...]:
    """The first key and the length of each stream, in the order in which the kernels come to them."""
    found = []
    for group in groups:
        start = group.start
        for length in group.lengths:
            found.append((start, length))
            start += length
    return tuple(found)


def alike(groups: tuple[Group, ...]) -> tuple[int, ...]:
    """The lengths in every group, where all groups are alike and one tile of keys; else none."""
    kinds = {(group.first, group.second, group.lengths) for group in groups}
    lengths = groups[0].lengths if len(groups) > 1 and len(kinds) == 1 and groups[0].first == 16 else ()
    return lengths if len(set(lengths)) == 1 else ()


def lengths_of(groups: tuple[Group, ...]) -> tuple[int, ...]:
    """The streams' lengths in the order of the groups; never empty, since Triton has no empty tuple of numbers."""
    return tuple(length for group in groups for length in group.lengths) or (0,)


def flat(groups: tuple[Group, ...]) -> tuple[tuple[int, ...], ...]:
    """Each group as numbers alone: long, start, stream, two sizes, where its lengths start, end, how many streams.

    Triton 3.6 loses a tuple in a tuple in a tuple.
    """
    found, offset = [], 0
    for g in groups:
        found.append((int(g.long), g.start, g.stream, g.first, g.second, offset, g.end, len(g.lengths)))
        offset += len(g.lengths)
    return tuple(found)


@functools.lru_cache(maxsize=256)
def parts(head_dim: int) -> tuple[int, ...]:
    """The head dimension as one or two powers of two, at least 16, with the least padding."""
    powers = (16, 32, 64, 128, 256)
    choices = [(a,) for a in powers] + [(a, b) for a in powers for b in powers if b <= a < 256]
    return min((c for c in choices if sum(c) >= head_dim), key=lambda c: (sum(c), len(c)))


class Tile(NamedTuple):
    """How one program of the passes over the pixels runs."""

    pixels: int
    warps: int
    stages: int
    short: int  # a stream of more keys is taken in blocks
    block: int  # keys of a block
    resident: int  # bytes of keys and values that a program keeps for all its pixels


class KeyTile(NamedTuple):
    """How one program of the pass over the keys runs."""

    keys: int  # at most, of a chunk of text
    image_keys: int  # at most, of a chunk of images
    pixels: int
    warps: int
    stages: int


class Rule(NamedTuple):
    """A line of a table of configurations; the first that fits is taken."""

    where: str  # an architecture's name begins so
    size: int  # bytes of an element
    width: int  # the widest padded head dimension
    load: int  # the most that a call may ask for: TEXT, IMAGES, EXTRAS or ALL
    tile: Any


TEXT, IMAGES, ALL = 0, 1, 3  # plain text; images too; regions, biases and read-outs too
EXTRAS = 2  # regions, biases and read-outs without images

FORWARD = (
    Rule("sm_9", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_9", 2, 96, ALL, Tile(64, 4, 1, 80, 32, 62 << 10)),
    Rule("sm_9", 2, 256, ALL, Tile(64, 4, 1, 80, 16, 96 << 10)),
    Rule("sm_10", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_10", 2, 48, EXTRAS, Tile(64, 4, 1, 80, 32, 62 << 10)),
    Rule("sm_10", 2, 96, EXTRAS, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("sm_10", 2, 256, ALL, Tile(64, 8, 1, 80, 32, 62 << 10)),
    Rule("", 2, 96, IMAGES, Tile(64, 4, 2, 80, 32, 62 << 10)),
    Rule("", 2, 256, ALL, Tile(64, 4, 1, 80, 16, 62 << 10)),
    Rule("", 4, 64, ALL, Tile(32, 4, 1, 16, 16, 0)),
    Rule("", 8, 256, ALL, Tile(16, 4, 1, 16, 16, 0)),
)
BACKWARD = (
    Rule("", 2, 96, TEXT, Tile(64, 4, 1, 80, 32, 0)),
    Rule("sm_10", 2, 48, IMAGES, Tile(64, 4, 2, 16, 32, 0)),
    Rule("sm_10", 2, 48, ALL, Tile(64, 4, 1, 16, 32, 0)),
    Rule("sm_10", 2, 64, IMAGES, Tile(64, 4, 3, 16, 16, 0)),
    Rule("sm_10", 2, 64, ALL, Tile(64, 8, 1, 16, 16, 0)),
    Rule("", 2, 96, ALL, Tile(64, 4, 1, 16, 16, 0)),
    Rule("", 2, 256, TEXT, Tile(64, 4, 1, 16, 16, 0)),
    Rule("", 2, 256, IMAGES, Tile(16, 8, 1, 16, 16, 0)),
    Rule("sm_10", 2, 256, EXTRAS, Tile(64, 8, 1, 16, 16, 0)),
    Rule("", 2, 256, ALL, Tile(16, 8, 2, 16, 16, 0)),
    Rule("", 8, 256, ALL, Tile(16, 4, 1, 16, 16, 0)),
)
KEYS = (
    Rule("", 2, 64, IMAGES, KeyTile(80, 64, 32, 4, 1)),
    Rule("sm_10", 2, 48, ALL, KeyTile(32, 16, 32, 8, 1)),
    Rule("", 2, 64, ALL, KeyTile(32, 16, 32, 4, 1)),
    Rule("", 2, 96, ALL, KeyTile(32, 16, 16, 4, 1)),
    Rule("sm_10", 2, 256, IMAGES, KeyTile(16, 16, 32, 8, 1)),
    Rule("", 2, 256, ALL, KeyTile(16, 16, 32, 4, 1)),
    Rule("", 8, 256, ALL, KeyTile(16, 16, 16, 4, 1)),
)
PROGRAMS = 4  # per multiprocessor, before a program takes another tile of pixels
MOST_TILES = 16
SUM_TILE = (8, 256)  # summands, columns


def configuration(rules: tuple[Rule, ...], where: str, size: int, width: int, load: int) -> Any:
    def fits(r: Rule) -> bool:
        return where.startswith(r.where) and size <= r.size and width <= r.width and load <= r.load

    return next(rule.tile for rule in rules if fits(rule))


class Plan(NamedTuple):
    """What the kernels are specialised for."""

    parts: tuple[int, ...]
    text: str  # "short", "long" or "none"
    cut: tuple[int, int]
    groups: tuple[Group, ...]
    text_resident: bool
    images_resident: bool
    tile: Tile


@functools.lru_cache(maxsize=512)
def plan(
    rules: tuple[Rule, ...], where: str, size: int, head_dim: int, keys: int, lengths: tuple[int, ...], load: int
) -> Plan:
    """The cut of one call's shapes; `size` is an element's bytes."""
    wide = parts(head_dim)
    tile = configuration(rules, where, size, sum(wide), load)
    text = "none" if keys == 0 else "short" if keys <= tile.short else "long"
    groups = pack(lengths, tile.short)
    bytes_per_key = 2 * sum(wide) * size
    of_text = sum(cut(keys)) * bytes_per_key if text == "short" else 0
    of_images = sum(g.first + g.second for g in groups) * bytes_per_key
    text_resident = text == "short" and of_text <= tile.resident
    images_resident = not any(g.long for g in groups) and of_text + of_images <= tile.resident
    return Plan(wide, text, cut(keys) if text == "short" else (16, 0), groups, text_resident, images_resident, tile)


def padding(size: int, head_dim: int, keys: int, lengths: tuple[int, ...]) -> float:
    """Products that the forward kernel issues over those that the equation needs, pixels filling their tiles."""
    cuts = plan(FORWARD, "sm_90", size, head_dim, keys, lengths, IMAGES if lengths else TEXT)

    def blocks(length: int) -> int:
        return cuts.tile.block * ceil_div(length, cuts.tile.block)

    issued = sum(cuts.cut) if cuts.text == "short" else blocks(keys)
    issued += sum(blocks(g.lengths[0]) if g.long else g.first + g.second for g in cuts.groups)
    return issued * sum(cuts.parts) / ((keys + sum(lengths)) * head_dim)


def per_program(tiles: int, others: int, device: torch.device) -> int:
    """Tiles of pixels that one program takes, such that all multiprocessors have work."""
    return max(1, min(MOST_TILES, tiles * others // (PROGRAMS * processors(device))))


def chunk_of(keys: int, most: int) -> tuple[int, int]:
    """The one or two tiles of a chunk of keys that cover a stream at the least cost."""
    choices = [sizes for sizes in ((80, (64, 16)), (64, (64, 0)), (48, (32, 16)), (32, (32, 0)), (16, (16, 0)))
               if sizes[0] <= most]  # fmt: skip
    # What is padded, and that each further chunk reads the pixels again.
    return min(choices, key=lambda choice: ceil_div(keys, choice[0]) * (choice[0] + 16))[1]


def ends(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The number behind the last key of each image stream but the last."""
    return tuple(itertools.accumulate(lengths[:-1]))
