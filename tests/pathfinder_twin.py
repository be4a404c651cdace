"""Pathfinder pictures one at a time and in plain loops: the slow twin, written from the published process.

It shares with the package the random numbers (the same Philox words, in the same order) and nothing else: every
dash is drawn on a whole canvas, masks are dilated pixel by pixel, and Pillow reduces the picture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves

Array = np.ndarray[Any, Any]
Spot = tuple[int, int]


def ceil(value: float) -> int:
    return math.ceil(round(value, 9))


def shift(spot: Spot, angle: float, distance: float) -> Spot:
    return spot[0] + ceil(distance * math.sin(angle)), spot[1] + ceil(distance * math.cos(angle))


def round_dilation(picture: Array, radius: int) -> Array:
    height, width = picture.shape
    padded, result = np.pad(picture, radius), picture.copy()
    for down in range(2 * radius + 1):
        for right in range(2 * radius + 1):
            if (down - radius) ** 2 + (right - radius) ** 2 <= radius**2:
                result = np.maximum(result, padded[down : down + height, right : right + width])
    return result


@functools.lru_cache(maxsize=4096)
def stamp(curves: PathfinderCurves, angle: float) -> tuple[Array, Array]:
    """Ink (1 = 4096) and covered area (0 to 255) of a line from the middle of a small square."""
    scale = curves.antialias
    half = curves.paddle_length + math.ceil(curves.paddle_thickness) + curves.margin
    picture = Image.new("F", (2 * half * scale + 1,) * 2, 0)
    middle = (half * scale, half * scale)
    end = shift(middle, angle, curves.paddle_length * scale)
    ImageDraw.Draw(picture).line([middle[::-1], end[::-1]], fill=255, width=int(curves.paddle_thickness * scale))
    small = (2 * half + 1, 2 * half + 1)
    ink = np.asarray(picture.resize(small, Image.Resampling.LANCZOS)).astype(float) / 255
    dilated = round_dilation(np.asarray(picture), curves.margin * scale).astype(np.uint8)
    area = np.asarray(Image.fromarray(dilated).resize(small, Image.Resampling.LANCZOS)).astype(int)
    return np.maximum(np.rint(ink * 4096), 0).astype(int), area


def on_canvas(small: Array, spot: Spot, window: int) -> Array:
    half = small.shape[0] // 2
    large = np.zeros((window + 4 * half, window + 4 * half), dtype=int)
    large[spot[0] + half : spot[0] + 3 * half + 1, spot[1] + half : spot[1] + 3 * half + 1] = small
    return large[2 * half : -2 * half, 2 * half : -2 * half]


class SlowPicture:
    """One picture; ``seen`` are the pixels covered by the two target curves and by the rest."""

    def __init__(self, curves: PathfinderCurves, seed: int, stream: int, index: int) -> None:
        if isinstance(curves.margin, tuple):
            self.words = words(seed, stream + 16, index)
            curves = dataclasses.replace(curves, margin=curves.margin[self.below(len(curves.margin))])
        self.curves = curves
        self.words = words(seed, stream + 8, index)
        brightness = self.brightness()
        self.words = words(seed, stream, index)
        self.ink = np.zeros((curves.window, curves.window), dtype=int)
        coin = self.below(2)
        if curves.balanced and index % 2:
            before = np.random.Philox(key=[seed, stream * 2**56 + index - 1]).random_raw(1)
            coin = 1 - (int(before[0]) >> 63)
        self.label, marked = coin, self.below(2)
        border = np.full((curves.window, curves.window), 255)
        border[curves.padding : -curves.padding, curves.padding : -curves.padding] = 0
        targets = None
        while targets is None:
            targets = self.targets(border)
        mask = border
        for curve in targets:
            for dash in curve:
                mask = np.maximum(mask, self.area(*dash))
        clutter = self.distractors(mask)
        slots = {curve * curves.path_length + n: d for curve in (0, 1) for n, d in enumerate(targets[curve])} | clutter
        # what is seen of each curve without the others, to tell which pixels belong to which
        self.seen = np.zeros((3, curves.window, curves.window), dtype=bool)
        for slot, (spot, angle) in slots.items():
            ink = on_canvas(stamp(curves, angle)[0], spot, curves.window)
            self.ink = np.maximum(self.ink, ink * round(brightness[slot] * 4096) // 4096)
            self.seen[min(slot // curves.path_length, 2)] |= 2 * ink >= stamp(curves, angle)[0].max()
        self.marked = marked
        ends = (targets[marked][0][0], targets[marked if self.label else 1 - marked][-1][0])
        for spot in ends:
            self.ink = np.maximum(self.ink, self.disc(spot) * 4096 // 255)
        drawn = Image.fromarray((self.ink * 255 // self.ink.max()).astype(np.uint8))
        side = (curves.size, curves.size)
        self.image = np.asarray(drawn.resize(side, Image.Resampling.BILINEAR))

    def brightness(self) -> list[float]:
        """Of all dashes there may be: of the first curve, of the second one, and of the rest."""
        length, total = self.curves.path_length, self.curves.max_paddles
        curve, paddle = self.curves.contrast, self.curves.paddle_contrast
        own = [curve, curve]
        if isinstance(curve, tuple):
            twice = [value for value in curve for _ in (0, 1)]
            own = [twice.pop(self.below(len(twice))) for _ in (0, 1)]
        one = [paddle[self.below(len(paddle))] if isinstance(paddle, tuple) else paddle for _ in range(length + 1)]
        one, first = one[:-1], one[-1]
        rest = [curve[self.below(len(curve))] if isinstance(curve, tuple) else curve for _ in range(total - 2 * length)]
        return [own[0] * value for value in one] + [own[1] * value for value in [first, *one[1:]]] + rest

    def below(self, bound: int) -> int:
        return (self.words.pop() >> 32) * bound >> 32

    def area(self, spot: Spot, angle: float) -> Array:
        return on_canvas(stamp(self.curves, angle)[1], spot, self.curves.window)

    def disc(self, spot: Spot) -> Array:
        # on a larger canvas: a disc is the same at the border
        scale, window, around = self.curves.antialias, self.curves.window, 20
        down, right = np.mgrid[0 : (window + 2 * around) * scale, 0 : (window + 2 * around) * scale]
        distance = (down - (spot[0] + around) * scale) ** 2 + (right - (spot[1] + around) * scale) ** 2
        large = np.where(distance <= (self.curves.marker_radius * scale) ** 2, 255, 0).astype(np.uint8)
        drawn = Image.fromarray(large).resize((window + 2 * around,) * 2, Image.Resampling.LANCZOS)
        return np.asarray(drawn).astype(int)[around : around + window, around : around + window]

    def degrees(self) -> float:
        return math.radians(self.below(360) - 180)

    def next_dash(self, mask: Array, joint: Spot, heading: float) -> tuple[Spot, Spot, float] | None:
        """New joint, end and heading; None where there is no way on."""
        curves = self.curves
        joint = shift(joint, heading, curves.paddle_length + 2 * curves.margin)
        radius = curves.paddle_length + curves.margin
        arc = np.arange(0, 360, 360 / (2 * radius * math.pi))
        steps = {
            (
                math.floor(round(radius * math.sin(math.radians(a)), 9)),
                math.floor(round(radius * math.cos(math.radians(a)), 9)),
            )
            for a in arc.tolist()
        }
        reach = radius + curves.margin
        top, left = joint[0] + 40 - reach, joint[1] + 40 - reach
        around = np.pad(mask, 40, constant_values=255)[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
        wide = round_dilation(around, curves.margin)
        choices, weights = [], []
        for down, right in sorted(steps):
            angle = math.atan2(down, right)
            turn = min(abs(angle - heading), 2 * math.pi - abs(angle - heading))
            straight = math.cos(min(turn * curves.continuity, math.pi / 2)) ** 2
            free = 255 - int(wide[reach + down, reach + right])
            choices.append(((joint[0] + down, joint[1] + right), angle))
            weights.append(free * round(straight * 65536))
        total = sum(weights)
        if total / (255 * 65536) < 1e-4:
            return None
        for _ in range(curves.paddle_retries + 1):
            drawn, number = self.below(total), 0
            while drawn >= weights[number]:
                drawn -= weights[number]
                number += 1
            end, angle = choices[number]
            if (mask + self.area(end, back(angle))).max() < 1.8 * 255:
                return joint, end, angle
        return None

    def joint_of_first(self, start: Spot, heading: float) -> Spot:
        head = shift(start, heading, self.curves.paddle_length)
        return shift(head, heading, -self.curves.paddle_length - self.curves.margin)

    def targets(self, border: Array) -> list[list[tuple[Spot, float]]] | None:
        curves = self.curves
        heading = self.degrees()
        near = max(curves.padding, 2 * curves.seed_distance)
        whole = np.argwhere(stamp(curves, heading)[1] == 255) - stamp(curves, heading)[1].shape[0] // 2
        inside: Callable[[int, int], range] = lambda low, high: range(near - low, curves.window - near - high)
        whole = np.vstack([whole, [0, 0]])
        rows, columns = inside(*span(whole[:, 0])), inside(*span(whole[:, 1]))
        chosen = self.below(max(1, len(rows) * len(columns)))
        if not rows or not columns:
            self.below(360)
            self.below(360)
            return None
        first = (rows[chosen // len(columns)], columns[chosen % len(columns)])
        other = self.degrees()
        angle = math.radians(self.below(360))
        second = (
            first[0] + round(round(curves.seed_distance * math.sin(angle), 9)),
            first[1] + round(round(curves.seed_distance * math.cos(angle), 9)),
        )
        if (np.maximum(border, self.area(first, heading)) + self.area(second, other)).max() >= 1.8 * 255:
            return None
        dashes = [[(first, heading)], [(second, other)]]
        state = [(self.joint_of_first(first, heading), heading), (self.joint_of_first(second, other), other)]
        for _ in range(curves.path_length - 1):
            for own in (0, 1):
                mask = border
                for dash in dashes[own][:-1] + dashes[1 - own]:
                    mask = np.maximum(mask, self.area(*dash))
                found = self.next_dash(mask, *state[own])
                if found is None:
                    return None
                joint, end, angle = found
                state[own] = (joint, angle)
                dashes[own].append((end, back(angle)))
        return dashes

    def distractors(self, mask: Array) -> dict[int, tuple[Spot, float]]:
        """Dashes by their slots, of distractors and then of single dashes."""
        curves, slots, slot = self.curves, {}, 2 * self.curves.path_length
        for number, length, retries in (
            (curves.distractor_count, curves.paddles_per_distractor, curves.distractor_retries),
            (curves.single_count, 1, curves.paddle_retries),
        ):
            for first in range(slot, slot + number * length, length):
                for _ in range(retries + 1):
                    if (mask <= 0.3 * 255).sum() / curves.window**2 < curves.stop_with_availability:
                        break
                    dashes = self.distractor(mask, length)
                    if dashes is not None:
                        slots |= {first + position: dash for position, dash in enumerate(dashes)}
                        for dash in dashes:
                            mask = np.maximum(mask, self.area(*dash))
                        break
            slot += number * length
        return slots

    def distractor(self, mask: Array, length: int) -> list[tuple[Spot, float]] | None:
        curves, heading = self.curves, self.degrees()
        side = curves.window - 2 * curves.padding
        start = None
        for _ in range(16):
            down, right = divmod(self.below(side * side), side)
            start = (curves.padding + down, curves.padding + right)
            if self.has_room(mask, [start], heading):
                break
            start = None
        if start is None:
            inner = range(curves.padding, curves.window - curves.padding)
            free = self.has_room(mask, [(y, x) for y in inner for x in inner], heading)
            if not free:
                return None
            start = free[self.below(len(free))]
        dashes, joint = [(start, heading)], self.joint_of_first(start, heading)
        for _ in range(length - 1):
            own = mask
            for dash in dashes[:-1]:
                own = np.maximum(own, self.area(*dash))
            found = self.next_dash(own, joint, heading)
            if found is None:
                return None
            joint, end, heading = found
            dashes.append((end, back(heading)))
        return dashes

    def has_room(self, mask: Array, spots: list[Spot], angle: float) -> list[Spot]:
        """Those of the places where a curve has room to start."""
        small = stamp(self.curves, angle)[1]
        half, whole = small.shape[0] // 2, small == 255
        padded = np.pad(mask, half, constant_values=255)
        cut = lambda spot: padded[spot[0] : spot[0] + 2 * half + 1, spot[1] : spot[1] + 2 * half + 1]
        return [s for s in spots if mask[s] <= 0.3 * 255 and (cut(s)[whole] <= 0.3 * 255).all()]


def words(seed: int, stream: int, index: int) -> list[int]:
    found: list[int] = np.random.Philox(key=[seed, stream * 2**56 + index]).random_raw(100_000).tolist()[::-1]
    return found


def back(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


def span(values: Array) -> tuple[int, int]:
    return int(values.min()), int(values.max())
